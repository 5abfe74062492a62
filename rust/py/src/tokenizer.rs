//! `Tokenizer` for Python.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use hfcore_engine::error::{Error, Result};
use hfcore_engine::gguf;
use hfcore_engine::tokenizer::{self, Detokenizer, Encoding, Wishes};
use hfcore_engine::vocab;
use numpy::PyArray1;
use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::chat::{self, Compiled};
use crate::convert::{to_ids, to_path};
use crate::error::{guarded, invalid, run, run_here};
use crate::template::{self, ChatTemplate, Continue, Flags};

/// Shorter texts are encoded without giving the GIL away.
const SHORT_TEXT: usize = 2048;

/// Text to token ids and back, exactly as Hugging Face `tokenizers` does.
#[pyclass(frozen, module = "hfcore._core")]
pub struct Tokenizer {
    inner: Arc<tokenizer::Tokenizer>,
    compiled: Compiled,
}

impl Tokenizer {
    pub fn new(inner: Arc<tokenizer::Tokenizer>) -> Self {
        Self {
            inner,
            compiled: Compiled::default(),
        }
    }
}

#[pymethods]
impl Tokenizer {
    /// Read a `tokenizer.json`, a directory that holds one, or a `.gguf` file's vocabulary.
    #[staticmethod]
    fn from_path(py: Python<'_>, path: &Bound<'_, PyAny>) -> PyResult<Self> {
        let path = to_path(path)?;
        let inner = beside_numpy(py, || open(&path))?;
        Ok(Self::new(Arc::new(inner)))
    }

    /// The ids of a text or a pair, shape [tokens].
    #[pyo3(signature = (text, *, pair = None, add_special_tokens = true, truncation = None,
        padding = None, max_length = None, pad_to_multiple_of = None, truncation_side = None,
        padding_side = None))]
    #[allow(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: &str,
        pair: Option<&str>,
        add_special_tokens: bool,
        truncation: Option<Choice>,
        padding: Option<Choice>,
        max_length: Option<usize>,
        pad_to_multiple_of: Option<usize>,
        truncation_side: Option<&str>,
        padding_side: Option<&str>,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let wishes = Wishes {
            truncation: truncation.as_ref().map(Choice::truncation),
            padding: padding.as_ref().map(Choice::padding),
            max_length,
            pad_to_multiple_of,
            truncation_side,
            padding_side,
        };
        let inner = &self.inner;
        let encode = || match (pair, is_empty(&wishes)) {
            (None, true) => inner.encode(text, add_special_tokens),
            _ => inner.encode_ids(text, pair, &inner.options(&wishes, add_special_tokens)?),
        };
        // Giving the GIL away and taking it again costs as much as some hundred bytes.
        let ids = match text.len() + pair.map_or(0, str::len) < SHORT_TEXT {
            true => run_here(py, encode)?,
            false => run(py, encode)?,
        };
        Ok(array(py, ids))
    }

    /// The ids of each text or pair, as `encode` alone would give them; on several threads.
    #[pyo3(signature = (texts, *, add_special_tokens = true, truncation = None, padding = None,
        max_length = None, pad_to_multiple_of = None, truncation_side = None,
        padding_side = None))]
    #[allow(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyAny>>,
        add_special_tokens: bool,
        truncation: Option<Choice>,
        padding: Option<Choice>,
        max_length: Option<usize>,
        pad_to_multiple_of: Option<usize>,
        truncation_side: Option<&str>,
        padding_side: Option<&str>,
    ) -> PyResult<Vec<Bound<'py, PyArray1<u32>>>> {
        let wishes = Wishes {
            truncation: truncation.as_ref().map(Choice::truncation),
            padding: padding.as_ref().map(Choice::padding),
            max_length,
            pad_to_multiple_of,
            truncation_side,
            padding_side,
        };
        let owned = texts.iter().map(Texts::new).collect::<PyResult<Vec<_>>>()?;
        let texts = owned
            .iter()
            .map(Texts::borrow)
            .collect::<PyResult<Vec<_>>>()?;
        let inner = &self.inner;
        let all = run(py, || {
            match is_empty(&wishes) && texts.iter().all(|t| t.1.is_none()) {
                true => {
                    let alone: Vec<&str> = texts.iter().map(|text| text.0).collect();
                    inner.encode_batch(&alone, add_special_tokens)
                }
                false => {
                    let options = inner.options(&wishes, add_special_tokens)?;
                    inner.encode_ids_batch(&texts, &options)
                }
            }
        })?;
        Ok(all.into_iter().map(|ids| array(py, ids)).collect())
    }

    /// Ids with all that belongs to them, of each text or pair.
    #[pyo3(signature = (texts, *, add_special_tokens = true, truncation = None, padding = None,
        max_length = None, pad_to_multiple_of = None, truncation_side = None,
        padding_side = None))]
    #[allow(clippy::too_many_arguments, reason = "Python's keyword arguments")]
    fn encodings<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyAny>>,
        add_special_tokens: bool,
        truncation: Option<Choice>,
        padding: Option<Choice>,
        max_length: Option<usize>,
        pad_to_multiple_of: Option<usize>,
        truncation_side: Option<&str>,
        padding_side: Option<&str>,
    ) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let wishes = Wishes {
            truncation: truncation.as_ref().map(Choice::truncation),
            padding: padding.as_ref().map(Choice::padding),
            max_length,
            pad_to_multiple_of,
            truncation_side,
            padding_side,
        };
        let owned = texts.iter().map(Texts::new).collect::<PyResult<Vec<_>>>()?;
        let texts = owned
            .iter()
            .map(Texts::borrow)
            .collect::<PyResult<Vec<_>>>()?;
        let inner = &self.inner;
        let all = run(py, || {
            let options = inner.options(&wishes, add_special_tokens)?;
            inner.encode_batch_with(&texts, &options)
        })?;
        all.into_iter()
            .map(|encoding| to_dict(py, encoding))
            .collect()
    }

    /// The ids of a text of (text, trusted) segments: added tokens are such where it is trusted.
    fn encode_segments<'py>(
        &self,
        py: Python<'py>,
        segments: Vec<(String, bool)>,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let segments: Vec<(&str, bool)> = segments
            .iter()
            .map(|(text, trusted)| (text.as_str(), *trusted))
            .collect();
        Ok(array(
            py,
            run(py, || self.inner.encode_segments(&segments))?,
        ))
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

    /// The texts of several lists of ids; on several threads.
    #[pyo3(signature = (lists, *, skip_special_tokens = true))]
    fn decode_batch(
        &self,
        py: Python<'_>,
        lists: Vec<Bound<'_, PyAny>>,
        skip_special_tokens: bool,
    ) -> PyResult<Vec<String>> {
        let lists = lists
            .iter()
            .map(|ids| to_ids(ids, "ids"))
            .collect::<PyResult<Vec<_>>>()?;
        run(py, || self.inner.decode_batch(&lists, skip_special_tokens))
    }

    /// A decoder that takes one id at a time.
    #[pyo3(signature = (*, skip_special_tokens = true))]
    fn decode_stream(&self, skip_special_tokens: bool) -> DecodeStream {
        let inner = Detokenizer::new(self.inner.clone(), skip_special_tokens);
        DecodeStream {
            inner: Mutex::new(inner),
        }
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

    /// A conversation as token ids, through the chat template.
    #[pyo3(signature = (
        conversation, *, tools = None, documents = None, chat_template = None,
        add_generation_prompt = false, continue_final_message = Continue::Flag(false), tokenize = true,
        return_dict = true, return_assistant_tokens_mask = false, parse_special_in_content = None,
        **variables
    ))]
    #[expect(clippy::too_many_arguments, reason = "transformers', by name")]
    fn apply_chat_template<'py>(
        &self,
        py: Python<'py>,
        conversation: &Bound<'py, PyAny>,
        tools: Option<&Bound<'py, PyAny>>,
        documents: Option<&Bound<'py, PyAny>>,
        chat_template: Option<&str>,
        add_generation_prompt: bool,
        continue_final_message: Continue,
        tokenize: bool,
        return_dict: bool,
        return_assistant_tokens_mask: bool,
        parse_special_in_content: Option<bool>,
        variables: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let masked = return_assistant_tokens_mask;
        if masked && !(tokenize && return_dict) {
            let problem = "return_assistant_tokens_mask needs tokenize=True and return_dict=True";
            return Err(invalid(py, problem));
        }
        let flags = Flags {
            add_generation_prompt,
            continue_final_message,
            keep_none_keys: false,
        };
        let tokenizer = &self.inner;
        let template = self
            .compiled
            .template(tokenizer, chat_template, tools.is_some());
        let template = run_here(py, || template)?;
        let given = template::conversation(conversation, tools, documents, flags, None, variables)?;
        if !tokenize {
            let rendered = run(py, || template.render_conversation(given, false))?;
            return Ok(PyString::new(py, &rendered.text).into_any());
        }
        let applied = run(py, || {
            chat::apply(
                &template,
                tokenizer,
                given,
                parse_special_in_content,
                masked,
            )
        })?;
        if !return_dict {
            return Ok(array(py, applied.ids).into_any());
        }
        let dict = PyDict::new(py);
        let ones = vec![1; applied.ids.len()];
        dict.set_item("input_ids", array(py, applied.ids))?;
        dict.set_item("attention_mask", array(py, ones))?;
        if let Some(mask) = applied.assistant_mask {
            dict.set_item("assistant_masks", array(py, mask))?;
        }
        Ok(dict.into_any())
    }

    /// The main chat template that came with the tokenizer, None if none did.
    #[getter]
    fn chat_template(&self, py: Python<'_>) -> PyResult<Option<ChatTemplate>> {
        match run(py, || self.compiled.template(&self.inner, None, false)) {
            Ok(inner) => Ok(Some(ChatTemplate::new(inner))),
            Err(_) if !self.inner.chat_templates().contains_key("default") => Ok(None),
            Err(error) => Err(error),
        }
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

/// The text of one sequence, id by id; joined, it is `decode` of all of them.
#[pyclass(frozen, module = "hfcore._core")]
pub struct DecodeStream {
    inner: Mutex<Detokenizer>,
}

#[pymethods]
impl DecodeStream {
    /// Take the next id; returns the text that is now certain, which may be empty.
    fn push(&self, token_id: u32) -> String {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(token_id)
    }

    /// End the sequence; returns what was held back. The next push begins a new one.
    fn finish(&self) -> String {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .finish()
    }
}

/// An option that is a name, or whether the usual one is wanted.
#[derive(FromPyObject)]
enum Choice {
    Flag(bool),
    Name(String),
}

impl Choice {
    fn truncation(&self) -> &str {
        match self {
            Self::Flag(true) => "longest_first",
            Self::Flag(false) => "do_not_truncate",
            Self::Name(name) => name,
        }
    }

    fn padding(&self) -> &str {
        match self {
            Self::Flag(true) => "longest",
            Self::Flag(false) => "do_not_pad",
            Self::Name(name) => name,
        }
    }
}

/// A text, or a tuple of two.
struct Texts<'py> {
    first: Bound<'py, PyString>,
    second: Option<Bound<'py, PyString>>,
}

impl<'py> Texts<'py> {
    fn new(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(text) = object.cast::<PyString>() {
            return Ok(Self {
                first: text.clone(),
                second: None,
            });
        }
        let (first, second) = object.extract().map_err(|_| {
            let kind = object
                .get_type()
                .name()
                .map_or_else(|_| "?".to_owned(), |n| n.to_string());
            invalid(
                object.py(),
                format!("a text must be a str or a tuple of two, got {kind}"),
            )
        })?;
        Ok(Self {
            first,
            second: Some(second),
        })
    }

    fn borrow(&self) -> PyResult<(&str, Option<&str>)> {
        let second = self.second.as_ref().map(|text| text.to_str()).transpose()?;
        Ok((self.first.to_str()?, second))
    }
}

fn is_empty(wishes: &Wishes<'_>) -> bool {
    let Wishes {
        truncation,
        padding,
        max_length,
        pad_to_multiple_of,
        truncation_side,
        padding_side,
    } = wishes;
    let names = [truncation, padding, truncation_side, padding_side];
    names.iter().all(|name| name.is_none()) && max_length.or(*pad_to_multiple_of).is_none()
}

/// Do `work`; where numpy, which ids come in, is not imported yet, import it meanwhile: that takes as long
/// as to read a large file.
fn beside_numpy<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    if py.import("sys")?.getattr("modules")?.contains("numpy")? {
        return run(py, work);
    }
    thread::scope(|scope| {
        let worker = scope.spawn(|| guarded(work));
        let numpy = py.import("numpy");
        let done = run(py, || {
            let died = |_| Err(Error::Internal("the thread that reads died".to_owned()));
            worker.join().unwrap_or_else(died)
        });
        // Whoever needs it is told that it is not there; a Ctrl-C is for now.
        match numpy {
            Err(error) if !error.is_instance_of::<PyImportError>(py) => Err(error),
            _ => done,
        }
    })
}

/// Few ids are copied, which is quicker than to hand over their memory.
fn array(py: Python<'_>, ids: Vec<u32>) -> Bound<'_, PyArray1<u32>> {
    match ids.len() < 4096 {
        true => PyArray1::from_slice(py, &ids),
        false => PyArray1::from_vec(py, ids),
    }
}

fn to_dict(py: Python<'_>, encoding: Encoding) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("input_ids", array(py, encoding.ids))?;
    dict.set_item("token_type_ids", array(py, encoding.type_ids))?;
    dict.set_item("attention_mask", array(py, encoding.attention_mask))?;
    dict.set_item(
        "special_tokens_mask",
        array(py, encoding.special_tokens_mask),
    )?;
    dict.set_item("offset_mapping", encoding.offsets)?;
    Ok(dict)
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
