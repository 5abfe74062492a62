//! `Turn` for Python: a prompt for a model that runs elsewhere, and its answer's text, read as it comes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hfcore_engine::model;
use hfcore_engine::options::Defaults;
use hfcore_engine::response::Parsed;
use pyo3::prelude::*;
use serde_json::Value;

use crate::convert::{Place, to_object, to_python};
use crate::engine::{to_options, to_prompt};
use crate::error::run;
use crate::template::ChatTemplate;

/// (text, reasoning, [(index, id, name, arguments)])
type Piece = (
    String,
    String,
    Vec<(usize, Option<String>, Option<String>, String)>,
);

/// One turn of a model that another library runs.
#[pyclass(frozen, module = "hfcore._core")]
pub struct Turn {
    inner: Mutex<model::Turn>,
}

#[pymethods]
impl Turn {
    #[new]
    #[pyo3(signature = (prompt, options, *, template = None, generation_config = None))]
    fn new(
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        options: &Bound<'_, PyAny>,
        template: Option<&Bound<'_, ChatTemplate>>,
        generation_config: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let prompt = to_prompt(prompt)?;
        let options = Value::Object(to_options(options)?);
        let place = Place::request("generation_config");
        let config = generation_config.map(|config| to_object(config, place));
        let config = config.transpose()?.map(Value::Object);
        let template = template.map(Bound::get);
        let inner = run(py, || {
            let defaults = match &config {
                Some(config) => Defaults::from_generation_config(config)?,
                None => Defaults::default(),
            };
            let template = template.map(|template| template.inner.as_ref());
            model::Turn::new(prompt, template, options, &defaults)
        })?;
        Ok(Self {
            inner: Mutex::new(inner),
        })
    }

    /// What is to be continued.
    #[getter]
    fn prompt(&self) -> String {
        self.lock().prompt().to_owned()
    }

    /// The request's options and the defaults as one, checked.
    #[getter]
    fn options<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let options = self.lock().options();
        to_python(py, &options)
    }

    /// Special tokens that must stand in the text that is pushed.
    #[getter]
    fn markers(&self) -> Vec<&'static str> {
        self.lock().markers().to_vec()
    }

    /// Whether a stop string came, or the end.
    #[getter]
    fn stopped(&self) -> bool {
        self.lock().stopped()
    }

    /// Whether any call began so far.
    #[getter]
    fn called(&self) -> bool {
        self.lock().called()
    }

    /// Whether a thought is under way; None where thoughts are not told from the rest.
    #[getter]
    fn in_thought(&self) -> Option<bool> {
        self.lock().in_thought()
    }

    /// Take the text of the next token.
    #[pyo3(signature = (text, *, may_stop = true))]
    fn push(&self, text: &str, may_stop: bool) -> Piece {
        piece(self.lock().push(text, may_stop))
    }

    /// No more text comes: what was held back.
    fn finish(&self) -> Piece {
        piece(self.lock().finish())
    }
}

impl Turn {
    fn lock(&self) -> MutexGuard<'_, model::Turn> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn piece(from: Parsed) -> Piece {
    let calls = from.calls.into_iter();
    let calls = calls.map(|call| (call.index, call.id, call.name, call.arguments));
    (from.text, from.reasoning, calls.collect())
}
