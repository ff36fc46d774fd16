"""What the gateway needs to know of the model before it accepts work for it."""

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.engine import Engine, EngineState, ModelInfo

RETRY_AFTER_S = 2  # a restarted engine loads a small model in about this time


def served_model(engine: Engine) -> ModelInfo:
    """The engine's model, also while it restarts. Raises ApiError(ENGINE_DOWN) before it was first loaded."""
    status = engine.status()
    if status.model is None:
        raise ApiError(ErrorKind.ENGINE_DOWN, f"the engine is not ready: {status.detail}", retry_after_s=RETRY_AFTER_S)
    return status.model


def ready_model(engine: Engine) -> ModelInfo:
    """The engine's model if turns can run now. Raises ApiError(ENGINE_DOWN)."""
    status = engine.status()
    if status.model is None or status.state is not EngineState.READY:
        raise ApiError(ErrorKind.ENGINE_DOWN, f"the engine is not ready: {status.detail}", retry_after_s=RETRY_AFTER_S)
    return status.model
