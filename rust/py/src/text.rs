//! `ChatTemplate` and `Tokenizer` for Python.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use hfcore_engine::error::Result;
use hfcore_engine::gguf;
use hfcore_engine::template::{self, Now, RenderRequest};
use hfcore_engine::tokenizer;
use hfcore_engine::vocab;
use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyDateTime, PyDict};
use serde_json::Map;

use crate::convert::{Place, to_ids, to_object, to_path, to_strings, to_value, type_name};
use crate::error::{invalid, run};

/// A compiled chat template: Jinja as transformers runs it.
#[pyclass(frozen, module = "hfcore._core")]
pub struct ChatTemplate {
    inner: Arc<template::ChatTemplate>,
}

impl ChatTemplate {
    pub fn new(inner: Arc<template::ChatTemplate>) -> Self {
        Self { inner }
    }
}

#[pymethods]
impl ChatTemplate {
    #[new]
    #[pyo3(signature = (source, *, special_tokens = None, name = "chat_template"))]
    fn compile(
        py: Python<'_>,
        source: &str,
        special_tokens: Option<&Bound<'_, PyAny>>,
        name: &str,
    ) -> PyResult<Self> {
        let special_tokens = special_tokens.map(|tokens| to_strings(tokens, "special_tokens"));
        let special_tokens = special_tokens.transpose()?.unwrap_or_default();
        run(py, || {
            template::ChatTemplate::new(name, source, &special_tokens)
        })
        .map(|inner| Self::new(Arc::new(inner)))
    }

    /// The prompt for these messages.
    #[pyo3(signature = (
        messages, *, tools = None, documents = None, add_generation_prompt = false,
        continue_final_message = false, keep_none_keys = false, now = None, **variables
    ))]
    #[expect(clippy::too_many_arguments, reason = "apply_chat_template's, by name")]
    fn render(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        documents: Option<&Bound<'_, PyAny>>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        keep_none_keys: bool,
        now: Option<&Bound<'_, PyAny>>,
        variables: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<String> {
        let flags = Flags {
            add_generation_prompt,
            continue_final_message,
            keep_none_keys,
        };
        let request = render_request(messages, tools, documents, flags, now, variables)?;
        run(py, || self.inner.render(&request))
    }

    /// `render`, and where the assistant's own words stand: (start, end) in code points.
    #[pyo3(signature = (
        messages, *, tools = None, documents = None, add_generation_prompt = false,
        continue_final_message = false, keep_none_keys = false, now = None, **variables
    ))]
    #[expect(clippy::too_many_arguments, reason = "apply_chat_template's, by name")]
    fn render_with_spans(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        documents: Option<&Bound<'_, PyAny>>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        keep_none_keys: bool,
        now: Option<&Bound<'_, PyAny>>,
        variables: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<(String, Vec<(usize, usize)>)> {
        let flags = Flags {
            add_generation_prompt,
            continue_final_message,
            keep_none_keys,
        };
        let request = render_request(messages, tools, documents, flags, now, variables)?;
        let (text, spans) = run(py, || self.inner.render_with_spans(&request))?;
        Ok((
            text,
            spans
                .into_iter()
                .map(|span| (span.start, span.end))
                .collect(),
        ))
    }

    /// The Jinja text.
    #[getter]
    fn source(&self) -> &str {
        self.inner.source()
    }

    /// What errors call it.
    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }

    /// Whether the template looks at `tools` at all.
    #[getter]
    fn takes_tools(&self) -> bool {
        self.inner.takes_tools()
    }

    fn __repr__(&self) -> String {
        format!(
            "ChatTemplate({:?}, {} characters)",
            self.inner.name(),
            self.inner.source().len()
        )
    }
}

/// The yes and no of a render, as `RenderRequest` names them.
#[derive(Default)]
pub struct Flags {
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
    pub keep_none_keys: bool,
}

/// What a render is given.
pub fn render_request(
    messages: &Bound<'_, PyAny>,
    tools: Option<&Bound<'_, PyAny>>,
    documents: Option<&Bound<'_, PyAny>>,
    flags: Flags,
    now: Option<&Bound<'_, PyAny>>,
    variables: Option<&Bound<'_, PyDict>>,
) -> PyResult<RenderRequest> {
    let optional = |value: Option<&Bound<'_, PyAny>>, name| {
        value
            .map(|value| to_value(value, Place::template(name)))
            .transpose()
    };
    Ok(RenderRequest {
        messages: to_value(messages, Place::template("messages"))?,
        tools: optional(tools, "tools")?,
        documents: optional(documents, "documents")?,
        add_generation_prompt: flags.add_generation_prompt,
        continue_final_message: flags.continue_final_message,
        now: now.map(to_now).transpose()?,
        keep_none_keys: flags.keep_none_keys,
        variables: match variables {
            Some(variables) => to_object(variables, Place::template("variables"))?,
            None => Map::new(),
        },
    })
}

/// A `datetime.datetime`, its zone left aside: templates show the hour it says.
fn to_now(object: &Bound<'_, PyAny>) -> PyResult<Now> {
    let Ok(moment) = object.cast::<PyDateTime>() else {
        let problem = format!("now must be a datetime, got {}", type_name(object));
        return Err(invalid(object.py(), problem));
    };
    let field = |name| moment.getattr(name)?.extract::<u8>();
    Ok(Now {
        year: moment.getattr("year")?.extract()?,
        month: field("month")?,
        day: field("day")?,
        hour: field("hour")?,
        minute: field("minute")?,
        second: field("second")?,
    })
}

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
