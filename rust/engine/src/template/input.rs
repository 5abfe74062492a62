//! What a render is given, as template values: put together value by value, or from JSON.

use std::sync::Arc;

use serde_json::Value as Json;

use super::clock::Now;
use super::origin::{Str, all_data};
use super::value::{Budget, Res, Value};
use super::{RenderRequest, template_error};
use crate::error::{Error, Result};

/// A value for a template.
#[derive(Debug, Clone)]
pub struct Input(pub(super) Value);

impl Input {
    /// The bytes of a text; 0 for anything else.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Value::Str(s) => s.text.len(),
            _ => 0,
        }
    }
}

/// Makes values, and counts what they take.
pub struct Inputs {
    budget: Budget,
    bytes: usize,
}

impl Default for Inputs {
    fn default() -> Inputs {
        Inputs {
            budget: Budget::for_input(0),
            bytes: 0,
        }
    }
}

impl Inputs {
    /// About as many bytes as the values made so far have as text.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// None.
    pub fn none(&mut self) -> Input {
        self.bytes += 8;
        Input(Value::None)
    }

    /// A bool.
    pub fn bool(&mut self, flag: bool) -> Input {
        self.bytes += 8;
        Input(Value::Bool(flag))
    }

    /// An integer of up to 128 bits.
    pub fn int(&mut self, number: i128) -> Input {
        self.bytes += 8;
        Input(Value::Int(number))
    }

    /// An integer of any size, from its decimal digits.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for what is no integer of at most 4300 digits.
    pub fn integer(&mut self, digits: &str) -> Result<Input> {
        self.bytes += digits.len();
        refused(Value::integer(digits))
    }

    /// A float.
    pub fn float(&mut self, number: f64) -> Input {
        self.bytes += 8;
        Input(Value::Float(number))
    }

    /// A text that was made before: it is shared.
    pub fn again(&mut self, text: &Input) -> Input {
        if let Value::Str(s) = &text.0 {
            self.bytes += s.text.len() + 4;
        }
        text.clone()
    }

    /// A text.
    pub fn text(&mut self, text: impl Into<Arc<str>>) -> Input {
        let text = text.into();
        self.bytes += text.len() + 4;
        Input(Value::Str(Str::from(text)))
    }

    /// A list.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] where values nest too deep.
    pub fn list(&mut self, items: Vec<Input>) -> Result<Input> {
        self.bytes += 4;
        let items = items.into_iter().map(|item| item.0).collect();
        refused(Value::list(items, &mut self.budget))
    }

    /// A tuple.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub fn tuple(&mut self, items: Vec<Input>) -> Result<Input> {
        self.bytes += 4;
        let items = items.into_iter().map(|item| item.0).collect();
        refused(Value::tuple(items, &mut self.budget))
    }

    /// A dict; of two entries with one key the later counts.
    ///
    /// # Errors
    /// As [`list`](Self::list), and for a key that Python cannot hash.
    pub fn dict(&mut self, entries: Vec<(Input, Input)>) -> Result<Input> {
        self.bytes += 4;
        let entries = entries.into_iter().map(|(k, v)| (k.0, v.0)).collect();
        refused(Value::dict(entries, &mut self.budget))
    }

    /// A dict whose keys are texts that differ.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub fn object(&mut self, entries: Vec<(Input, Input)>) -> Result<Input> {
        self.bytes += 4;
        let entries = entries.into_iter().map(|(k, v)| (k.0, v.0)).collect();
        refused(Value::object(entries, &mut self.budget))
    }

    /// JSON, as Python reads it.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub fn json(&mut self, json: &Json) -> Result<Input> {
        self.bytes += json_size(json);
        refused(Value::from_json(json, &mut self.budget))
    }
}

fn refused(made: Res<Value>) -> Result<Input> {
    made.map(Input)
        .map_err(|fault| Error::InvalidRequest(fault.message))
}

/// What one render is given, as template values; see [`RenderRequest`].
#[derive(Debug)]
pub struct Conversation {
    pub messages: Input,
    pub tools: Option<Input>,
    pub documents: Option<Input>,
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
    /// The field to be continued; None is `content`.
    pub continue_field: Option<String>,
    pub now: Option<Now>,
    pub keep_none_keys: bool,
    pub variables: Vec<(String, Input)>,
    /// What the values take, as [`Inputs::bytes`] has counted: longer input may run longer.
    pub bytes: usize,
}

impl RenderRequest {
    /// The same request in template values.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] where values nest too deep.
    pub fn conversation(&self) -> Result<Conversation> {
        let mut inputs = Inputs::default();
        let mut variables = Vec::with_capacity(self.variables.len());
        for (name, value) in &self.variables {
            variables.push((name.clone(), inputs.json(value)?));
        }
        let mut optional = |json: &Option<Json>| json.as_ref().map(|j| inputs.json(j)).transpose();
        Ok(Conversation {
            tools: optional(&self.tools)?,
            documents: optional(&self.documents)?,
            messages: inputs.json(&self.messages)?,
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            continue_field: self.continue_field.clone(),
            now: self.now,
            keep_none_keys: self.keep_none_keys,
            variables,
            bytes: inputs.bytes,
        })
    }
}

impl Conversation {
    /// What apply_chat_template does to messages first: null keys dropped, reasoning under both names.
    pub(super) fn prepared(&mut self) -> Result<Vec<Value>> {
        let invalid = |message: String| Err(Error::InvalidRequest(message));
        check_objects("tools", self.tools.as_ref())?;
        check_objects("documents", self.documents.as_ref())?;
        let Some(messages) = items(&self.messages.0) else {
            return invalid(format!(
                "messages must be an array of objects, got {}",
                kind(&self.messages.0)
            ));
        };
        if messages.is_empty() {
            return invalid("messages must hold at least one message, got none".into());
        }
        let mut prepared = Vec::with_capacity(messages.len());
        for (i, message) in messages.iter().enumerate() {
            let Value::Dict(dict) = message else {
                return invalid(format!(
                    "message {i} must be an object, got {}",
                    kind(message)
                ));
            };
            let message = self.without_none(message, &dict.entries)?;
            prepared.push(with_reasoning(message)?);
        }
        Ok(prepared)
    }

    fn without_none(&self, message: &Value, entries: &[(Value, Value)]) -> Result<Value> {
        let is_none = |(_, value): &&(Value, Value)| matches!(value, Value::None);
        if self.keep_none_keys || !entries.iter().any(|entry| is_none(&entry)) {
            return Ok(message.clone());
        }
        let kept = entries.iter().filter(|entry| !is_none(entry)).cloned();
        dict(kept.collect())
    }
}

fn dict(entries: Vec<(Value, Value)>) -> Result<Value> {
    Value::dict(entries, &mut Budget::for_input(0))
        .map_err(|fault| template_error("messages", *fault))
}

fn items(value: &Value) -> Option<&[Value]> {
    match value {
        Value::List(seq) | Value::Tuple(seq) => Some(&seq.items),
        _ => None,
    }
}

/// None, or an array of objects.
fn check_objects(what: &str, given: Option<&Input>) -> Result<()> {
    let wanted = |came: &str| {
        Err(Error::InvalidRequest(format!(
            "{what} must be an array of objects, got {came}"
        )))
    };
    let Some(Input(given)) = given else {
        return Ok(());
    };
    match (given, items(given)) {
        (Value::None, _) => Ok(()),
        (_, Some(items)) => match items.iter().find(|item| !matches!(item, Value::Dict(_))) {
            Some(item) => wanted(&format!("{} in it", kind(item))),
            None => Ok(()),
        },
        (other, None) => wanted(kind(other)),
    }
}

/// The names that a message's reasoning goes by; the first is what templates read.
pub(super) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The first reasoning that is not null, under `reasoning_content` and, if missing, `thinking`, which comes first.
fn with_reasoning(message: Value) -> Result<Value> {
    let Value::Dict(known) = &message else {
        return Ok(message);
    };
    let found = REASONING
        .iter()
        .find_map(|name| known.get_str(name).filter(|v| !matches!(v, Value::None)));
    let Some(reasoning) = found.cloned() else {
        return Ok(message);
    };
    let mut entries = Vec::with_capacity(known.entries.len() + 2);
    entries.push((Value::from("thinking"), reasoning.clone()));
    entries.extend(known.entries.iter().cloned());
    entries.push((Value::from("reasoning_content"), reasoning));
    dict(entries)
}

/// A message's field.
pub(super) fn field(message: &Value, name: &str) -> Option<Value> {
    match message {
        Value::Dict(dict) => dict.get_str(name).cloned(),
        _ => None,
    }
}

/// The message with another value in this field.
pub(super) fn with_field(message: &Value, name: &str, value: Value) -> Value {
    let Value::Dict(known) = message else {
        return message.clone();
    };
    let mut entries = known.entries.clone();
    for (key, old) in &mut entries {
        if matches!(key, Value::Str(s) if *s.text == *name) {
            *old = value.clone();
        }
    }
    dict(entries).unwrap_or_else(|_| message.clone())
}

/// The text of a content, or the last text among its parts; and the content with `tag` behind it.
pub(super) fn continued(content: &Value, tag: &str) -> Option<(String, Value)> {
    if let Value::Str(s) = content {
        return Some((
            s.text.to_string(),
            Value::from(&*format!("{}{tag}", s.text)),
        ));
    }
    let parts = items(content)?;
    let (at, text) = parts
        .iter()
        .enumerate()
        .rev()
        .find_map(|(at, part)| Some((at, field(part, "text")?)))?;
    let (original, tagged) = match &text {
        Value::Str(_) => continued(&text, tag)?,
        _ => return None,
    };
    let mut parts = parts.to_vec();
    parts[at] = with_field(&parts[at], "text", tagged);
    let parts = Value::list(parts, &mut Budget::for_input(0)).ok()?;
    Some((original, parts))
}

/// The same value with all its text marked as data.
pub(super) fn as_data(value: &Value) -> Value {
    let mut budget = Budget::for_input(1 << 30);
    let all = |items: &[Value]| items.iter().map(as_data).collect::<Vec<_>>();
    let made = match value {
        Value::Str(s) => Ok(Value::Str(Str {
            origin: all_data(),
            ..s.clone()
        })),
        Value::List(seq) => Value::list(all(&seq.items), &mut budget),
        Value::Tuple(seq) => Value::tuple(all(&seq.items), &mut budget),
        Value::Dict(dict) => {
            let entries = dict.entries.iter();
            let entries = entries.map(|(k, v)| (as_data(k), as_data(v))).collect();
            Value::dict(entries, &mut budget)
        }
        other => Ok(other.clone()),
    };
    made.unwrap_or(Value::None)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::None => "null",
        Value::Bool(_) => "a boolean",
        Value::Int(_) | Value::Big(_) | Value::Float(_) => "a number",
        Value::Str(_) => "a string",
        Value::List(_) | Value::Tuple(_) => "an array",
        _ => "an object",
    }
}

/// About as many bytes as the value has as text.
fn json_size(json: &Json) -> usize {
    match json {
        Json::String(s) => s.len() + 2,
        Json::Array(items) => items.iter().map(json_size).sum::<usize>() + 2,
        Json::Object(map) => {
            map.iter()
                .map(|(k, v)| k.len() + 4 + json_size(v))
                .sum::<usize>()
                + 2
        }
        _ => 8,
    }
}
