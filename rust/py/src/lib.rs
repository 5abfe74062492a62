//! `hfcore._core`: the door between Python and the engine. It converts, releases the GIL, calls
//! and maps errors; what it decides, it decides nowhere else.

mod chat;
mod convert;
mod delta;
mod encoder;
mod engine;
mod error;
mod quantize;
mod input;
mod stream;
mod template;
mod tokenizer;
mod turn;

use hfcore_engine::error::Error;
use hfcore_engine::files;
use hfcore_engine::memory;
use hfcore_engine::options::OPTION_NAMES;
use hfcore_engine::weights;
use numpy::{PyArray1, PyArray2, PyArrayDyn, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// Quantised blocks of a GGUF type as numbers: [n, bytes of a block] -> [n, numbers of a block].
#[pyfunction]
fn dequantize<'py>(
    py: Python<'py>,
    type_name: &str,
    blocks: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let (rows, bytes) = convert::to_bytes(blocks, "blocks")?;
    let (numbers, width) = error::run(py, || weights::dequantize_blocks(type_name, rows, &bytes))?;
    PyArray1::from_vec(py, numbers).reshape([rows, width])
}

/// One tensor of a model file as numbers, in its shape.
#[pyfunction]
fn read_tensor<'py>(
    py: Python<'py>,
    path: &Bound<'py, PyAny>,
    name: &str,
) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
    let path = convert::to_path(path)?;
    let (shape, numbers) = error::run(py, || files::numbers(&path, name))?;
    PyArray1::from_vec(py, numbers).reshape(shape)
}

/// What this machine can do at most, measured now with so many threads; `read_bytes` are read.
#[pyfunction]
fn limits(py: Python<'_>, threads: usize, read_bytes: usize) -> PyResult<Bound<'_, PyDict>> {
    if threads == 0 {
        return Err(error::invalid(py, "threads must be at least 1, got 0"));
    }
    let found = error::run(py, || {
        hfcore_engine::limits::measure(threads, read_bytes).map_err(|_| Error::OutOfMemory {
            needed: read_bytes as u64,
            available: memory::available().unwrap_or(0),
        })
    })?;
    let limits = PyDict::new(py);
    limits.set_item("threads", found.threads)?;
    limits.set_item("instruction_set", found.instruction_set)?;
    limits.set_item("read_bytes_per_second", found.read_bytes_per_second)?;
    limits.set_item(
        "int8_operations_per_second",
        found.int8_operations_per_second,
    )?;
    Ok(limits)
}

/// What the compiled half of hfcore offers; see hfcore for the whole.
#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("OPTION_NAMES", PyTuple::new(module.py(), OPTION_NAMES)?)?;
    module.add_class::<template::ChatTemplate>()?;
    module.add_class::<tokenizer::Tokenizer>()?;
    module.add_class::<tokenizer::DecodeStream>()?;
    module.add_class::<encoder::Encoder>()?;
    module.add_class::<engine::Engine>()?;
    module.add_class::<stream::Stream>()?;
    module.add_class::<delta::Delta>()?;
    module.add_class::<delta::TokenLogprob>()?;
    module.add_class::<delta::Usage>()?;
    module.add_class::<stream::Notifier>()?;
    module.add_class::<turn::Turn>()?;
    module.add_function(wrap_pyfunction!(limits, module)?)?;
    module.add_function(wrap_pyfunction!(read_tensor, module)?)?;
    module.add_function(wrap_pyfunction!(quantize::quantize, module)?)?;
    module.add_function(wrap_pyfunction!(quantize::quantize_file, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize, module)?)
}
