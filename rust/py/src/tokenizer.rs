//! `Tokenizer` for Python.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use hfcore_engine::error::Result;
use hfcore_engine::gguf;
use hfcore_engine::template;
use hfcore_engine::tokenizer;
use hfcore_engine::vocab;
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::convert::{to_ids, to_path};
use crate::error::run;
use crate::template::ChatTemplate;

/// Text to token ids and back, exactly as Hugging Face `tokenizers` does.
#[pyclass(frozen, module = "hfcore._core")]
pub struct Tokenizer {
    inner: Arc<tokenizer::Tokenizer>,
}

impl Tokenizer {
    pub fn new(inner: Arc<tokenizer::Tokenizer>) -> Self {
        Self { inner }
    }
}

#[pymethods]
impl Tokenizer {
    /// Read a `tokenizer.json`, a directory that holds one, or a `.gguf` file's vocabulary.
    #[staticmethod]
    fn from_path(py: Python<'_>, path: &Bound<'_, PyAny>) -> PyResult<Self> {
        let path = to_path(path)?;
        run(py, || open(&path)).map(|inner| Self::new(Arc::new(inner)))
    }

    /// The ids of a text, shape [tokens]; with those that begin (and end) a text, if wanted.
    #[pyo3(signature = (text, *, add_special_tokens = true))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: &str,
        add_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let ids = run(py, || self.inner.encode(text, add_special_tokens))?;
        Ok(PyArray1::from_vec(py, ids))
    }

    /// The ids of each text, as `encode` alone would give them; on several threads.
    #[pyo3(signature = (texts, *, add_special_tokens = true))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<String>,
        add_special_tokens: bool,
    ) -> PyResult<Vec<Bound<'py, PyArray1<u32>>>> {
        let all = run(py, || self.inner.encode_batch(&texts, add_special_tokens))?;
        Ok(all
            .into_iter()
            .map(|ids| PyArray1::from_vec(py, ids))
            .collect())
    }

    /// Where each token of `text` (without special ones) comes from, in code points.
    fn offsets(&self, py: Python<'_>, text: &str) -> PyResult<Vec<(u32, u32)>> {
        run(py, || self.inner.offsets(text))
    }

    /// The text of `ids`. Raises InvalidRequestError for an id outside the vocabulary.
    #[pyo3(signature = (ids, *, skip_special_tokens = true))]
    fn decode(
        &self,
        py: Python<'_>,
        ids: &Bound<'_, PyAny>,
        skip_special_tokens: bool,
    ) -> PyResult<String> {
        let ids = to_ids(ids, "ids")?;
        run(py, || self.inner.decode(&ids, skip_special_tokens))
    }

    /// The id of a token as the vocabulary spells it, None if there is none.
    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id as the vocabulary spells it, None if there is none.
    fn id_to_token(&self, token_id: u32) -> Option<String> {
        self.inner.id_to_token(token_id)
    }

    /// The highest id plus one, added tokens included.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    /// The main chat template that came with the tokenizer, None if none did.
    #[getter]
    fn chat_template(&self, py: Python<'_>) -> PyResult<Option<ChatTemplate>> {
        let Some(source) = self.inner.chat_templates().get("default") else {
            return Ok(None);
        };
        let special_tokens = self.inner.special_tokens();
        run(py, || {
            template::ChatTemplate::new("chat_template", source, special_tokens)
        })
        .map(|inner| Some(ChatTemplate::new(Arc::new(inner))))
    }

    /// `{"bos_token": "<s>", ...}`, as far as the files name them.
    #[getter]
    fn special_tokens(&self) -> BTreeMap<String, String> {
        self.inner.special_tokens().clone()
    }

    fn __repr__(&self) -> String {
        format!("Tokenizer(vocab_size={})", self.inner.vocab_size())
    }
}

fn open(path: &Path) -> Result<tokenizer::Tokenizer> {
    if path.is_dir() {
        return tokenizer::Tokenizer::from_dir(path);
    }
    if path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
    {
        return vocab::tokenizer(&gguf::open(path)?.metadata);
    }
    tokenizer::Tokenizer::from_file(path)
}
