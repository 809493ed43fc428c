"""Products with weights of which a part lies in a remote tier, by our own kernel on Hopper."""

from dak_inductor.lowering.linear.dispatch import run

__all__ = ["run"]
