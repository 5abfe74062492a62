//! `Encoder` for Python: an encoder or a decoder in memory, texts to vectors.

use std::path::PathBuf;

use hfcore_engine::model::DeviceKind;
use hfcore_engine::model::embed::{Embedder, Head};
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{to_path, to_size, to_texts};
use crate::engine::reported;
use crate::error::run;
use crate::tokenizer::Tokenizer;

/// A model in memory that makes vectors.
#[pyclass(frozen, module = "hfcore._core")]
pub struct Encoder {
    embedder: Embedder,
}

#[pymethods]
impl Encoder {
    #[new]
    #[pyo3(signature = (path, *, device = "cpu", threads = None, max_tokens = None, pooling = "mean", dense = Vec::new(), progress = None))]
    #[expect(clippy::too_many_arguments, reason = "Python's keywords")]
    fn open(
        py: Python<'_>,
        path: &Bound<'_, PyAny>,
        device: &str,
        threads: Option<&Bound<'_, PyAny>>,
        max_tokens: Option<&Bound<'_, PyAny>>,
        pooling: &str,
        dense: Vec<PathBuf>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let path = to_path(path)?;
        let device = run(py, || device.parse::<DeviceKind>())?;
        let threads = to_size(threads, "threads")?;
        let max_tokens = to_size(max_tokens, "max_tokens")?;
        let head = run(py, || {
            let head: Head = pooling.parse()?;
            Ok(Head { dense, ..head })
        })?;
        let open = |report: &(dyn Fn(u64, u64) -> bool + Sync)| {
            Embedder::open(&path, device, threads, max_tokens, head, report)
        };
        reported(py, progress, open).map(|embedder| Self { embedder })
    }

    /// A vector for each text: [texts, width]. Poolings that go over all tokens leave those of `left_out` out, with which the
    /// texts begin.
    #[pyo3(signature = (texts, *, normalize = false, left_out = "", progress = None))]
    fn embed<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        normalize: bool,
        left_out: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let texts = to_texts(texts, "texts")?;
        let count = texts.len();
        let vectors = reported(py, progress, |report| {
            let skip = match left_out {
                "" => 0,
                prompt => self.embedder.prompt_tokens(prompt)?,
            };
            self.embedder.embed(&texts, skip, normalize, report)
        })?;
        PyArray1::from_vec(py, vectors).reshape([count, self.embedder.width])
    }

    /// Its tokenizer, which cuts texts to `max_tokens`.
    #[getter]
    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::new(self.embedder.tokenizer.clone())
    }

    /// What was loaded: architecture, width, max_tokens.
    #[getter]
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let info = PyDict::new(py);
        info.set_item("architecture", self.embedder.family)?;
        info.set_item("width", self.embedder.width)?;
        info.set_item("max_tokens", self.embedder.max_tokens)?;
        Ok(info)
    }
}
