//! `Engine` for Python: a model in memory, and the requests it takes.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use hfcore_engine::error::Result;
use hfcore_engine::model::{DeviceKind, Model, ModelOptions, Prompt, kv_cache_dtype as kv_type};
use hfcore_engine::recipe::{AtLoad, Recipe};
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PySequence, PyString};
use serde_json::{Map, Value};

use crate::convert::{
    Place, is_list_like, to_ids, to_key, to_object, to_path, to_python, to_size, to_string,
    to_value, type_name,
};
use crate::error::{invalid, run};
use crate::stream::Stream;
use crate::template::{ChatTemplate, Flags, render_request};
use crate::tokenizer::Tokenizer;

/// Options that a chat template reads, where integers may be of any size.
const FOR_TEMPLATE: [&str; 3] = ["tools", "documents", "template_variables"];

/// A model in memory and the thread that runs its requests together.
#[pyclass(frozen, module = "hfcore._core")]
pub struct Engine {
    model: Model,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (
        path, *, device = "cpu", context_size = None, threads = None, chat_template = None,
        kv_cache_bytes = None, kv_cache_dtype = "f16", max_sequences = None, forced_tokens = true,
        prefix_cache = true, speculation = true, draft_model = None, adapters = None,
        quantization = None, quantization_cache = None, progress = None
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a keyword of the constructor"
    )]
    fn open(
        py: Python<'_>,
        path: &Bound<'_, PyAny>,
        device: &str,
        context_size: Option<&Bound<'_, PyAny>>,
        threads: Option<&Bound<'_, PyAny>>,
        chat_template: Option<String>,
        kv_cache_bytes: Option<&Bound<'_, PyAny>>,
        kv_cache_dtype: &str,
        max_sequences: Option<&Bound<'_, PyAny>>,
        forced_tokens: bool,
        prefix_cache: bool,
        speculation: bool,
        draft_model: Option<&Bound<'_, PyAny>>,
        adapters: Option<Vec<(String, Bound<'_, PyAny>)>>,
        quantization: Option<(String, bool, Vec<String>)>,
        quantization_cache: Option<&Bound<'_, PyAny>>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let path = to_path(path)?;
        let device = run(py, || device.parse::<DeviceKind>())?;
        let usual = ModelOptions::default();
        let options = ModelOptions {
            device,
            context_size: to_size(context_size, "context_size")?,
            threads: to_size(threads, "threads")?,
            chat_template,
            kv_cache_bytes: to_size(kv_cache_bytes, "kv_cache_bytes")?.map(|size| size as u64),
            kv_cache_dtype: run(py, || kv_type(kv_cache_dtype))?,
            max_sequences: to_size(max_sequences, "max_sequences")?.unwrap_or(usual.max_sequences),
            forced_tokens,
            prefix_cache,
            speculation,
            draft_model: draft_model.map(to_path).transpose()?,
            adapters: adapters
                .unwrap_or_default()
                .into_iter()
                .map(|(name, dir)| Ok((name, to_path(&dir)?)))
                .collect::<PyResult<_>>()?,
            quantization: quantization
                .map(|(name, nested, skip)| {
                    let recipe = run(py, || Recipe::parse(&name))?;
                    Ok::<_, PyErr>(AtLoad {
                        recipe,
                        nested,
                        skip,
                    })
                })
                .transpose()?,
            quantization_cache: quantization_cache.map(to_path).transpose()?,
        };
        load(py, &path, &options, progress).map(|model| Self { model })
    }

    /// Start a request; returns when it is queued.
    fn submit(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        options: &Bound<'_, PyAny>,
    ) -> PyResult<Stream> {
        let prompt = to_prompt(prompt)?;
        let options = Value::Object(to_options(options)?);
        let stream = run(py, || self.model.submit(prompt, options))?;
        Ok(Stream::new(stream, self.model.tokenizer().clone()))
    }

    /// The prompt that `submit` would make of these messages.
    #[pyo3(signature = (
        messages, *, tools = None, documents = None, add_generation_prompt = true,
        continue_final_message = false, **variables
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
        variables: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<String> {
        let flags = Flags {
            add_generation_prompt,
            continue_final_message: continue_final_message.into(),
            keep_none_keys: false,
        };
        let request = render_request(messages, tools, documents, flags, None, variables)?;
        run(py, || self.model.render(&request))
    }

    /// The model's raw scores after `ids`: shape [vocab], or [tokens, vocab] for every place.
    #[pyo3(signature = (ids, *, last_only = true, adapter = None))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        last_only: bool,
        adapter: Option<&str>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let ids = to_ids(ids, "ids")?;
        let logits = run(py, || self.model.logits(&ids, last_only, adapter))?;
        let width = logits.len() / ids.len().max(1);
        let array = PyArray1::from_vec(py, logits);
        if last_only {
            return Ok(array.into_any());
        }
        Ok(array.reshape([ids.len(), width])?.into_any())
    }

    /// The model's tokenizer.
    #[getter]
    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::new(self.model.tokenizer().clone())
    }

    /// The template that messages go through, None if there is none.
    #[getter]
    fn chat_template(&self) -> Option<ChatTemplate> {
        self.model
            .chat_template()
            .map(|template| ChatTemplate::new(template.clone()))
    }

    /// What was loaded: path, architecture, sizes, quantization, device, threads and so on.
    #[getter]
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.model.info())
    }

    /// Counters since the start: requests, tokens, steps, cache pages, seconds.
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.model.metrics())
    }

    /// Write what the cache holds to a file, under this name of the model; the tokens of it.
    fn save_prefix(
        &self,
        py: Python<'_>,
        path: &Bound<'_, PyAny>,
        identity: &str,
    ) -> PyResult<usize> {
        let path = to_path(path)?;
        run(py, || self.model.save_prefixes(&path, identity))
    }

    /// Take such a file into the cache; the tokens of it that are there now.
    fn load_prefix(
        &self,
        py: Python<'_>,
        path: &Bound<'_, PyAny>,
        identity: &str,
    ) -> PyResult<usize> {
        let path = to_path(path)?;
        run(py, || self.model.load_prefixes(&path, identity))
    }

    /// End all requests and free the model. A second call does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || {
            self.model.close();
            Ok(())
        })
    }

    fn __repr__(&self) -> String {
        let info = self.model.info();
        format!(
            "Engine({})",
            info.get("path").and_then(Value::as_str).unwrap_or_default()
        )
    }
}

/// Load a model.
fn load(
    py: Python<'_>,
    path: &Path,
    options: &ModelOptions,
    progress: Option<Py<PyAny>>,
) -> PyResult<Model> {
    reported(py, progress, |report| Model::open(path, options, &report))
}

/// Do something long that reports how far it is, in bytes done and in all. Ctrl-C, and whatever `progress` raises, end it.
pub fn reported<T: Send>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&(dyn Fn(u64, u64) -> bool + Sync)) -> Result<T> + Send,
) -> PyResult<T> {
    let raised = Mutex::new(None);
    let report = |done: u64, total: u64| {
        let told = Python::attach(|py| {
            py.check_signals()?;
            progress.as_ref().map_or(Ok(()), |progress| {
                progress.call1(py, (done, total)).map(drop)
            })
        });
        let go_on = told.is_ok();
        *raised.lock().unwrap_or_else(PoisonError::into_inner) = told.err();
        go_on
    };
    let done = run(py, || work(&report));
    match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => done,
    }
}

pub fn to_prompt(object: &Bound<'_, PyAny>) -> PyResult<Prompt> {
    if let Ok(text) = object.cast::<PyString>() {
        return to_string(text, "prompt").map(Prompt::Text);
    }
    if !is_list_like(object) && object.cast::<PyMapping>().is_ok() {
        let problem = "prompt must be a str, a list of messages or token ids, got one message";
        return Err(invalid(object.py(), problem));
    }
    let first = object
        .cast::<PySequence>()
        .ok()
        .and_then(|items| items.get_item(0).ok());
    match first {
        Some(first) if first.cast::<PyMapping>().is_ok() => {
            to_value(object, Place::template("messages")).map(Prompt::Messages)
        }
        Some(first) if !first.hasattr("__index__")? => Err(invalid(
            object.py(),
            format!(
                "prompt[0] must be a message (a mapping) or a token id, got {}",
                type_name(&first)
            ),
        )),
        _ => to_ids(object, "prompt").map(Prompt::Ids),
    }
}

pub fn to_options(object: &Bound<'_, PyAny>) -> PyResult<Map<String, Value>> {
    let Ok(options) = object.cast::<PyMapping>() else {
        return to_object(object, Place::request("options")); // says what is wrong
    };
    let mut out = Map::new();
    for pair in options.items()?.iter() {
        let (name, value) = pair.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
        let name = to_key(&name, &Place::request("options"))?;
        let for_template = FOR_TEMPLATE.contains(&name.as_str());
        let place = if for_template {
            Place::template(&name)
        } else {
            Place::request(&name)
        };
        let value = to_value(&value, place)?;
        out.insert(name, value);
    }
    Ok(out)
}
