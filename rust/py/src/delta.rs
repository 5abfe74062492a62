//! What a request brings, as Python values: `Delta`, `TokenLogprob`, `Usage`.

use hfcore_engine::sequence;
use hfcore_engine::tokenizer::Tokenizer;
use pyo3::prelude::*;

/// A token with its log probability (natural logarithm) in the distribution it was drawn from,
/// before top_k, top_p, min_p and typical_p cut; a prompt's in the model's own.
#[pyclass(frozen, eq, get_all, skip_from_py_object, module = "hfcore._core")]
#[derive(Clone, PartialEq)]
pub struct TokenLogprob {
    token: String,
    token_id: u32,
    logprob: f64,
    top: Vec<(u32, String, f64)>,
}

impl TokenLogprob {
    fn new(tokenizer: &Tokenizer, from: sequence::TokenLogprob) -> Self {
        let top = from.top.into_iter();
        Self {
            token: text_of(tokenizer, from.token),
            token_id: from.token,
            logprob: from.logprob.into(),
            top: top
                .map(|(id, logprob)| (id, text_of(tokenizer, id), logprob.into()))
                .collect(),
        }
    }
}

/// The text of one token: its own bytes where it has them (half a character shows as U+FFFD),
/// else as the vocabulary spells it.
fn text_of(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.token_bytes(id) {
        Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        None => tokenizer.id_to_token(id).unwrap_or_default(),
    }
}

#[pymethods]
impl TokenLogprob {
    fn __repr__(&self) -> String {
        let Self {
            token,
            token_id,
            logprob,
            top,
        } = self;
        format!(
            "TokenLogprob(token={token:?}, token_id={token_id}, logprob={logprob}, top={top:?})"
        )
    }
}

/// What a request cost.
#[pyclass(frozen, eq, get_all, skip_from_py_object, module = "hfcore._core")]
#[derive(Clone, PartialEq)]
pub struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    reasoning_tokens: Option<usize>,
    time_to_first_token: f64,
    total_time: f64,
}

impl From<sequence::Usage> for Usage {
    fn from(from: sequence::Usage) -> Self {
        Self {
            prompt_tokens: from.prompt_tokens,
            completion_tokens: from.completion_tokens,
            reasoning_tokens: from.reasoning_tokens,
            time_to_first_token: from.time_to_first_token.as_secs_f64(),
            total_time: from.total_time.as_secs_f64(),
        }
    }
}

#[pymethods]
impl Usage {
    fn __repr__(&self) -> String {
        let Self {
            prompt_tokens,
            completion_tokens,
            reasoning_tokens,
            time_to_first_token,
            total_time,
        } = self;
        let reasoning = match reasoning_tokens {
            Some(n) => format!("reasoning_tokens={n}, "),
            None => String::new(),
        };
        format!(
            "Usage(prompt_tokens={prompt_tokens}, completion_tokens={completion_tokens}, \
             {reasoning}time_to_first_token={time_to_first_token:.4}, total_time={total_time:.4})"
        )
    }
}

/// What a request has produced since the delta before it. A value: it never changes.
#[pyclass(frozen, eq, get_all, skip_from_py_object, module = "hfcore._core")]
#[derive(Clone, PartialEq)]
pub struct Delta {
    index: usize,
    text: String,
    reasoning: String,
    /// (index, id, name, arguments) each.
    tool_calls: Vec<(usize, Option<String>, Option<String>, String)>,
    token_ids: Vec<u32>,
    logprobs: Option<Vec<TokenLogprob>>,
    prompt_logprobs: Option<Vec<TokenLogprob>>,
    finish_reason: Option<&'static str>,
    usage: Option<Usage>,
}

impl Delta {
    pub fn new(tokenizer: &Tokenizer, from: sequence::Delta) -> Self {
        let of = |logprobs: Vec<sequence::TokenLogprob>| -> Vec<_> {
            let logprobs = logprobs.into_iter();
            logprobs
                .map(|one| TokenLogprob::new(tokenizer, one))
                .collect()
        };
        let logprobs = of(from.logprobs);
        let calls = from.tool_calls.into_iter();
        Self {
            index: from.index,
            text: from.text,
            reasoning: from.reasoning,
            tool_calls: calls
                .map(|call| (call.index, call.id, call.name, call.arguments))
                .collect(),
            token_ids: from.token_ids,
            logprobs: (!logprobs.is_empty()).then_some(logprobs),
            prompt_logprobs: from.prompt_logprobs.map(of),
            finish_reason: from.finish_reason.map(sequence::FinishReason::as_str),
            usage: from.usage.map(Usage::from),
        }
    }
}

#[pymethods]
impl Delta {
    fn __repr__(&self) -> String {
        let Self {
            text,
            token_ids,
            finish_reason,
            ..
        } = self;
        match finish_reason {
            Some(reason) => format!("Delta({text:?}, {token_ids:?}, finish_reason={reason:?})"),
            None => format!("Delta({text:?}, {token_ids:?})"),
        }
    }
}
