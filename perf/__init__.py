"""Benchmarks, installed as `tritonsym.perf`."""
