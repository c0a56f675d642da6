"""The front end's half of the engine: text in, text out, no torch.

Request types, tokenizer, chat template, incremental detokenising, stop strings, and the
client's side of the socket.
"""
