"""Programs that run the whole way: ``python -m scvi_cradle.benchmark`` and ``python -m scvi_cradle.benchmark.demo``."""

from scvi_cradle.benchmark._benchmark import BenchmarkResult, run_benchmark
from scvi_cradle.benchmark._prepare import DemoSettings
from scvi_cradle.benchmark._run import run_demo
from scvi_cradle.benchmark._settings import BenchmarkSettings

__all__ = ["BenchmarkResult", "BenchmarkSettings", "DemoSettings", "run_benchmark", "run_demo"]
