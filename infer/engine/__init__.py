"""Running a model: `Engine.load`, then score, generate, stream, or add and step."""

from quantbench.infer.engine.beam import Beam, BeamParams
from quantbench.infer.engine.engine import Engine
from quantbench.infer.engine.request import Completion, Output, Request, Token
from quantbench.infer.engine.sampling import SamplingParams
from quantbench.infer.engine.trace import Tap, Trace

__all__ = ["Beam", "BeamParams", "Completion", "Engine", "Output", "Request", "SamplingParams", "Tap", "Token", "Trace"]
