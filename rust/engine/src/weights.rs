//! A loaded model: metadata and named tensors in memory-mapped files. Says nothing of what they mean.

use std::collections::HashMap;
use std::ops::Range;

use hfcore_kernels::mmap::Mapped;
use hfcore_kernels::quant::TensorType;

/// One metadata value of a model file. Arrays are typed, so that a vocabulary stays compact.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Bool(bool),
    Int(i64),
    /// Only for what does not fit `Int`.
    UInt(u64),
    Float(f64),
    String(String),
    Bools(Vec<bool>),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strings(Vec<String>),
}

/// Where a tensor lies: which file, which bytes.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    pub tensor_type: TensorType,
    /// Outermost first: a matrix is `[out, in]`.
    pub shape: Vec<usize>,
    pub file: usize,
    pub bytes: Range<usize>,
}

/// A borrowed tensor: type, shape (outermost first) and its blocks.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub tensor_type: TensorType,
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

/// The files of one model, mapped, with everything in them named.
pub struct Weights {
    /// What the errors call it: the path that was opened.
    pub path: String,
    pub files: Vec<Mapped>,
    pub tensors: HashMap<String, TensorInfo>,
    /// GGUF key-values; for a safetensors directory, empty.
    pub metadata: HashMap<String, Value>,
    /// `config.json` and `generation_config.json` of a safetensors directory.
    pub config: Option<serde_json::Value>,
    pub generation_config: Option<serde_json::Value>,
}
