//! hfcore's engine: from messages to tokens, in the process. No Python, no unsafe.
#![forbid(unsafe_code)]

// A ladder: a module uses only modules above it. tests/test_architecture.py guards it.
pub mod error;
pub mod memory;
pub mod options;
pub mod template;
pub mod tokenizer;
pub mod quantised;
pub mod weights;
pub mod conversion;
pub mod prepared;
pub mod vocab;
pub mod recipe;
pub mod gguf;
pub mod checkpoint;
pub mod safetensors;
pub mod files;
pub mod arch;
pub mod export;
pub mod requantize;
pub mod batch;
pub mod pages;
pub mod saved;
pub mod prefix;
pub mod device;
pub mod cpu;
pub mod candle;
pub mod adapter;
pub mod decoder;
pub mod encoder;
pub mod sampling;
pub mod constraint;
pub mod response;
pub mod stop;
pub mod draft;
pub mod sequence;
pub mod pace;
pub mod scheduler;
pub mod stream;
pub mod engine;
pub mod model;

/// What the machine can do at most, for benchmarks.
pub use hfcore_kernels::limits;
