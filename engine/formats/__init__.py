"""Checkpoint formats: how weights lie in a Hugging Face folder.

A format is a frozen spec and two pure functions, ``pack`` and ``unpack``, that are each
other's inverse. The reader defines the format; ``compress`` depends on it.
"""

# Ends the message of a refusal: what can be done about a quantisation that is not served.
REMEDY = "quantise the original anew, or serve the original with --recipe"
# Where older checkpoints say how they were quantised, by config.json's ``quant_method``.
QUANTIZATION_FILES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
