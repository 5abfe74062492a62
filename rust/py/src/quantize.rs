//! Quantising for Python: numbers to blocks, and a whole file.

use hfcore_engine::recipe::Recipe;
use hfcore_engine::requantize::{self, Importance, Wanted};
use hfcore_engine::weights;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray2};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{to_path, to_size, type_name};
use crate::engine::reported;
use crate::error::{invalid, run};

/// Numbers as blocks of a GGUF type: [rows, numbers] -> [rows, bytes].
#[pyfunction]
#[pyo3(signature = (type_name, numbers, *, importance = None))]
pub fn quantize<'py>(
    py: Python<'py>,
    type_name: &str,
    numbers: &Bound<'py, PyAny>,
    importance: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyArray2<u8>>> {
    let (rows, x) = to_floats(numbers, "numbers")?;
    let weights = importance
        .map(|w| to_floats(w, "importance"))
        .transpose()?
        .map(|(_, w)| w);
    let blocks = run(py, || {
        weights::quantize_rows(type_name, rows, &x, weights.as_deref())
    })?;
    let width = blocks.len() / rows.max(1);
    PyArray1::from_vec(py, blocks).reshape([rows, width])
}

fn to_floats(object: &Bound<'_, PyAny>, name: &str) -> PyResult<(usize, Vec<f32>)> {
    let Ok(array) = object.extract::<PyReadonlyArray2<'_, f32>>() else {
        let problem = format!(
            "{name} must be a numpy array of float32 with 2 dimensions, got {}",
            type_name(object)
        );
        return Err(invalid(object.py(), problem));
    };
    let array = array.as_array();
    Ok((array.nrows(), array.iter().copied().collect()))
}

/// Write a GGUF file in other types; what became of it.
#[pyfunction]
#[pyo3(signature = (source, to, out, *, threads = None, importance = None, again = false, progress = None))]
#[expect(clippy::too_many_arguments, reason = "each is a keyword")]
pub fn quantize_file<'py>(
    py: Python<'py>,
    source: &Bound<'py, PyAny>,
    to: &str,
    out: &Bound<'py, PyAny>,
    threads: Option<&Bound<'py, PyAny>>,
    importance: Option<&Bound<'py, PyAny>>,
    again: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let (source, out) = (to_path(source)?, to_path(out)?);
    let threads = to_size(threads, "threads")?;
    let importance = importance.map(to_path).transpose()?;
    let made = reported(py, progress, |report| {
        let wanted = Wanted {
            recipe: Recipe::parse(to)?,
            importance: match importance {
                Some(path) => Importance::read(&path)?,
                None => Importance::default(),
            },
            again,
        };
        requantize::file(&source, &wanted, &out, threads, report)
    })?;
    let dict = PyDict::new(py);
    dict.set_item("tensors", made.tensors)?;
    dict.set_item("bytes_before", made.bytes_before)?;
    dict.set_item("bytes", made.bytes)?;
    Ok(dict)
}
