"""Code that the benchmarks share: interleaved measurement, results files, servers, reports."""
