"""Programs that run the whole way; ``python -m scvi_cradle.benchmark.demo`` is the first of them."""

from scvi_cradle.benchmark._prepare import DemoSettings
from scvi_cradle.benchmark._run import run_demo

__all__ = ["DemoSettings", "run_demo"]
