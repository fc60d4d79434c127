"""FlashInfer-Bench's files, one module a kind of file. moeref.interop.flashinfer_bench holds the public names."""
