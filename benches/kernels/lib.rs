//! Nothing: the benchmarks stand in benches/.
