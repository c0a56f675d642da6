"""``ModelService``: what is served, as found in memory."""

from engine.errors import EngineUnavailable
from server import convert
from server.door import Call
from server.serving import Serving
from venturi.v1 import model_pb2 as pb
from venturi.v1 import model_pb2_grpc

# Below gRPC's default message limit of 4 MiB.
_PIECE_BYTES = 1 << 20


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """One instance serves all calls."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def GetModel(self, request: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:
        """See the contract."""
        self._serving.find(request.model)
        return pb.GetModelResponse(model=self._model())

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """See the contract."""
        return pb.ListModelsResponse(models=[self._model()])

    async def GetTokenizer(self, request: pb.GetTokenizerRequest, call: Call) -> None:
        """See the contract."""
        for file in self._serving.generator(request.model).tokenizer.files():
            for begin in range(0, max(1, len(file.data)), _PIECE_BYTES):
                piece = pb.GetTokenizerResponse(
                    file_name=file.name,
                    data=file.data[begin : begin + _PIECE_BYTES],
                    total_bytes=len(file.data),
                    sha256=file.sha256,
                )
                await call.write(piece)

    def _model(self) -> pb.Model:
        gate = self._serving.gate
        model = self._refused() if gate is not None and gate.refused else self._loaded()
        if gate is not None:
            model.quality.CopyFrom(gate.to_proto())
            if gate.decode:
                model.speed.CopyFrom(gate.speed())
        return model

    def _refused(self) -> pb.Model:
        """Nothing is in memory."""
        serving = self._serving
        model = pb.Model(name=serving.name, variant=serving.variant)
        model.provenance.CopyFrom(serving.provenance.to_proto(""))
        return model

    def _loaded(self) -> pb.Model:
        serving, engine = self._serving, self._serving.engine
        if engine is None or engine.report is None:
            raise EngineUnavailable("the model is not loaded yet")
        model = convert.model(engine.report)
        model.name, model.variant = serving.name, serving.variant
        generator = serving.loaded_generator()
        model.has_chat_template = generator.tokenizer.has_chat_template
        model.eos_token_ids.extend(generator.defaults.eos_token_ids)
        provenance = serving.provenance
        model.provenance.CopyFrom(provenance.to_proto(engine.report.format))
        if serving.watch is not None:
            model.monitoring.CopyFrom(convert.monitoring(serving.watch))
        if serving.fallback is not None:
            model.fallback.variant = serving.fallback.variant
            model.fallback.reason = serving.fallback.reason
        methods = provenance.methods()
        for layer in model.layers:
            layer.method = methods.get(layer.name, "")
        return model
