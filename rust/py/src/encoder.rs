//! `Encoder` for Python: an encoder in memory, texts to vectors.

use hfcore_engine::model::DeviceKind;
use hfcore_engine::model::embed::{Embedder, Pooling};
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{to_path, to_size, to_texts};
use crate::engine::reported;
use crate::error::run;
use crate::tokenizer::Tokenizer;

/// An encoder of the BERT family in memory.
#[pyclass(frozen, module = "hfcore._core")]
pub struct Encoder {
    embedder: Embedder,
}

#[pymethods]
impl Encoder {
    #[new]
    #[pyo3(signature = (path, *, device = "cpu", threads = None, max_tokens = None, progress = None))]
    fn open(
        py: Python<'_>,
        path: &Bound<'_, PyAny>,
        device: &str,
        threads: Option<&Bound<'_, PyAny>>,
        max_tokens: Option<&Bound<'_, PyAny>>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let path = to_path(path)?;
        let device = run(py, || device.parse::<DeviceKind>())?;
        let threads = to_size(threads, "threads")?;
        let max_tokens = to_size(max_tokens, "max_tokens")?;
        let open = |report: &(dyn Fn(u64, u64) -> bool + Sync)| {
            Embedder::open(&path, device, threads, max_tokens, report)
        };
        reported(py, progress, open).map(|embedder| Self { embedder })
    }

    /// A vector for each text: [texts, width].
    #[pyo3(signature = (texts, *, pooling = "mean", normalize = false, progress = None))]
    fn embed<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        pooling: &str,
        normalize: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let texts = to_texts(texts, "texts")?;
        let pooling = run(py, || pooling.parse::<Pooling>())?;
        let count = texts.len();
        let vectors = reported(py, progress, |report| {
            self.embedder.embed(&texts, pooling, normalize, report)
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
