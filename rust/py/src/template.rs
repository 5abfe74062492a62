//! `ChatTemplate` for Python, and what a render is given.

use std::sync::Arc;

use hfcore_engine::template::{self, Conversation, Now, RenderRequest};
use pyo3::prelude::*;
use pyo3::types::{PyDateTime, PyDict, PyList};
use serde_json::Map;

use crate::convert::{Place, to_object, to_strings, to_value, type_name};
use crate::error::{invalid, run};
use crate::input::Reader;

/// A compiled chat template: Jinja as transformers runs it.
#[pyclass(frozen, module = "hfcore._core")]
pub struct ChatTemplate {
    pub inner: Arc<template::ChatTemplate>,
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
        continue_final_message = Continue::Flag(false), keep_none_keys = false, now = None, **variables
    ))]
    #[expect(clippy::too_many_arguments, reason = "apply_chat_template's, by name")]
    fn render(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        documents: Option<&Bound<'_, PyAny>>,
        add_generation_prompt: bool,
        continue_final_message: Continue,
        keep_none_keys: bool,
        now: Option<&Bound<'_, PyAny>>,
        variables: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<String> {
        let flags = Flags {
            add_generation_prompt,
            continue_final_message,
            keep_none_keys,
        };
        let given = conversation(messages, tools, documents, flags, now, variables)?;
        let rendered = run(py, || self.inner.render_conversation(given, false))?;
        Ok(rendered.text)
    }

    /// `render`, and where the assistant's own words stand: (start, end) in code points.
    #[pyo3(signature = (
        messages, *, tools = None, documents = None, add_generation_prompt = false,
        continue_final_message = Continue::Flag(false), keep_none_keys = false, now = None, **variables
    ))]
    #[expect(clippy::too_many_arguments, reason = "apply_chat_template's, by name")]
    fn render_with_spans(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        documents: Option<&Bound<'_, PyAny>>,
        add_generation_prompt: bool,
        continue_final_message: Continue,
        keep_none_keys: bool,
        now: Option<&Bound<'_, PyAny>>,
        variables: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<(String, Vec<(usize, usize)>)> {
        let flags = Flags {
            add_generation_prompt,
            continue_final_message,
            keep_none_keys,
        };
        let given = conversation(messages, tools, documents, flags, now, variables)?;
        let rendered = run(py, || self.inner.render_conversation(given, false))?;
        let spans = rendered.spans.into_iter();
        let spans = spans.map(|span| (span.start, span.end)).collect();
        Ok((rendered.text, spans))
    }

    /// `render` in parts: (text, whether the template itself wrote it).
    #[pyo3(signature = (
        messages, *, tools = None, documents = None, add_generation_prompt = false,
        continue_final_message = Continue::Flag(false), keep_none_keys = false, now = None, **variables
    ))]
    #[expect(clippy::too_many_arguments, reason = "apply_chat_template's, by name")]
    fn render_segments(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        documents: Option<&Bound<'_, PyAny>>,
        add_generation_prompt: bool,
        continue_final_message: Continue,
        keep_none_keys: bool,
        now: Option<&Bound<'_, PyAny>>,
        variables: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Vec<(String, bool)>> {
        let flags = Flags {
            add_generation_prompt,
            continue_final_message,
            keep_none_keys,
        };
        let given = conversation(messages, tools, documents, flags, now, variables)?;
        let rendered = run(py, || self.inner.render_conversation(given, true))?;
        let text = &rendered.text;
        let segments = rendered.segments.into_iter();
        Ok(segments
            .map(|segment| (text[segment.text].to_owned(), segment.template))
            .collect())
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

/// Whether the last message goes on, or the name of its field that does.
#[derive(FromPyObject)]
pub enum Continue {
    Flag(bool),
    Field(String),
}

impl Continue {
    fn field(self) -> Option<String> {
        match self {
            Self::Flag(_) => None,
            Self::Field(name) => Some(name).filter(|name| !name.is_empty()),
        }
    }

    fn is_wanted(&self) -> bool {
        match self {
            Self::Flag(flag) => *flag,
            Self::Field(name) => !name.is_empty(),
        }
    }
}

impl From<bool> for Continue {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

/// The choices of a render, as `RenderRequest` names them.
pub struct Flags {
    pub add_generation_prompt: bool,
    pub continue_final_message: Continue,
    pub keep_none_keys: bool,
}

/// What a render is given, straight as template values.
pub fn conversation(
    messages: &Bound<'_, PyAny>,
    tools: Option<&Bound<'_, PyAny>>,
    documents: Option<&Bound<'_, PyAny>>,
    flags: Flags,
    now: Option<&Bound<'_, PyAny>>,
    variables: Option<&Bound<'_, PyDict>>,
) -> PyResult<Conversation> {
    let mut reader = Reader::default();
    let messages = reader.read(messages, "messages")?;
    let tools = tools.map(|tools| with_schemas(tools)).transpose()?;
    let tools = tools
        .map(|tools| reader.read(&tools, "tools"))
        .transpose()?;
    let documents = documents.map(|documents| reader.read(documents, "documents"));
    Ok(Conversation {
        messages,
        tools,
        documents: documents.transpose()?,
        add_generation_prompt: flags.add_generation_prompt,
        continue_final_message: flags.continue_final_message.is_wanted(),
        continue_field: flags.continue_final_message.field(),
        now: now.map(to_now).transpose()?,
        keep_none_keys: flags.keep_none_keys,
        variables: match variables {
            Some(variables) => reader.variables(variables)?,
            None => Vec::new(),
        },
        bytes: reader.bytes(),
    })
}

/// Functions among tools become what `get_json_schema` makes of them.
fn with_schemas<'py>(tools: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let Ok(list) = tools.cast::<PyList>() else {
        return Ok(tools.clone());
    };
    let is_function =
        |tool: &Bound<'_, PyAny>| !tool.is_instance_of::<PyDict>() && tool.is_callable();
    if !list.iter().any(|tool| is_function(&tool)) {
        return Ok(tools.clone());
    }
    let schema = tools
        .py()
        .import("hfcore.schemas")?
        .getattr("get_json_schema")?;
    let made = PyList::empty(tools.py());
    for tool in list.iter() {
        match is_function(&tool) {
            true => made.append(schema.call1((tool,))?)?,
            false => made.append(tool)?,
        }
    }
    Ok(made.into_any())
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
        continue_final_message: flags.continue_final_message.is_wanted(),
        continue_field: flags.continue_final_message.field(),
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
