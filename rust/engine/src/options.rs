//! One request's wishes, validated once. Knows no model: what depends on a vocabulary or on a
//! context is checked at submit.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Every option a request may carry.
pub const OPTION_NAMES: &[&str] = &[
    "max_tokens",
    "min_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "n",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
    "add_special_tokens",
    "timeout",
    "priority",
    "adapter",
];

/// Stop strings of one request: how many, and how many bytes each may have.
const MAX_STOPS: usize = 64;
const MAX_STOP_BYTES: usize = 4096;
/// As OpenAI's: alternatives reported per token, completions per request, the reach of a bias.
const MAX_TOP_LOGPROBS: u64 = 20;
const MAX_COMPLETIONS: u64 = 128;
const MAX_LOGIT_BIAS: f64 = 100.0;
/// Longer than anyone waits, and short enough for every clock's arithmetic.
const MAX_TIMEOUT_SECONDS: f64 = 1e9;

/// What applies where a request says nothing: the model's `generation_config.json`, else what
/// transformers does without one (greedy; temperature 1 and top_k 50 once sampling is on).
#[derive(Debug, Clone, PartialEq)]
pub struct Defaults {
    pub do_sample: bool,
    pub temperature: f64,
    /// 0 = off.
    pub top_k: usize,
    pub top_p: f64,
    pub min_p: f64,
    pub typical_p: f64,
    pub repetition_penalty: f64,
    /// `max_new_tokens`; none = what the context leaves.
    pub max_tokens: Option<usize>,
    /// `eos_token_id`, one or several; empty = the tokenizer's own.
    pub eos_token_ids: Vec<u32>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            do_sample: false,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            max_tokens: None,
            eos_token_ids: Vec::new(),
        }
    }
}

impl Defaults {
    /// Read the parsed `generation_config.json`. Fields this engine does not know are left alone,
    /// `null` means unset, a temperature of 0 means greedy.
    ///
    /// # Errors
    /// `ModelFile` when a known field has a foreign type or an impossible value.
    pub fn from_generation_config(config: &Value) -> Result<Self> {
        Self::read(config).map_err(|error| Error::ModelFile {
            path: "generation_config.json".into(),
            problem: error.to_string(),
        })
    }

    fn read(config: &Value) -> Result<Self> {
        let fields = Fields::of("generation_config", config)?;
        let plain = Self::default();
        let temperature = fields
            .number("temperature", AtLeast(0.0))?
            .unwrap_or(plain.temperature);
        let greedy = temperature == 0.0;
        Ok(Self {
            do_sample: fields.flag("do_sample")?.unwrap_or(plain.do_sample) && !greedy,
            temperature: if greedy {
                plain.temperature
            } else {
                temperature
            },
            top_k: fields.top_k_of_file()?.unwrap_or(plain.top_k),
            // transformers lets a file say 0: the likeliest token alone.
            top_p: fields
                .number("top_p", Between(0.0, 1.0))?
                .unwrap_or(plain.top_p),
            min_p: fields
                .number("min_p", Between(0.0, 1.0))?
                .unwrap_or(plain.min_p),
            typical_p: fields
                .number("typical_p", AboveTo(0.0, 1.0))?
                .unwrap_or(plain.typical_p),
            repetition_penalty: fields
                .number("repetition_penalty", Above(0.0))?
                .unwrap_or(plain.repetition_penalty),
            max_tokens: fields.count("max_new_tokens", 1..=u32::MAX as u64)?,
            eos_token_ids: fields.eos_ids_of_file()?,
        })
    }
}

/// One request's options, complete and consistent.
///
/// Whether tokens are sampled: `temperature` 0 is greedy, always. Else an explicit `do_sample`
/// decides; else sampling is on as soon as the request sets a temperature or any of `top_k`,
/// `top_p`, `min_p`, `typical_p` to a value that acts; else the model's default. `do_sample` false
/// together with a sampling option that would then do nothing is refused.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Tokens to generate at most; none = what the context leaves.
    pub max_tokens: Option<usize>,
    /// No end token and no stop string ends the text before so many tokens.
    pub min_tokens: usize,
    /// False: the likeliest token each time.
    pub do_sample: bool,
    /// Above 0 whenever `do_sample`.
    pub temperature: f64,
    /// 0 = off.
    pub top_k: usize,
    pub top_p: f64,
    pub min_p: f64,
    pub typical_p: f64,
    /// Over prompt and output, each token once; 1 = off.
    pub repetition_penalty: f64,
    /// Over the output, per occurrence; 0 = off.
    pub frequency_penalty: f64,
    /// Over the output, once per token; 0 = off.
    pub presence_penalty: f64,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// None = drawn from the system. Completion `i` of several has `seed + i` (after the greatest
    /// seed comes 0): what a request of its own with that seed would give.
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    /// The model's end tokens do not end the text (`stop_token_ids` still do).
    pub ignore_eos: bool,
    /// Completions of the prompt, 1..=128.
    pub n: usize,
    /// Report each token's log probability in the distribution it was drawn from, before top_k,
    /// top_p, min_p and typical_p cut.
    pub logprobs: bool,
    /// Alternatives reported with each token, 0..=20.
    pub top_logprobs: usize,
    /// Report the log probabilities of the prompt's tokens from the second on, in the model's own
    /// distribution, with `top_logprobs` alternatives each.
    pub prompt_logprobs: bool,
    pub skip_special_tokens: bool,
    /// Of a text prompt only; none = true there. A chat template writes its own.
    pub add_special_tokens: Option<bool>,
    pub timeout: Option<Duration>,
    /// Who has the higher one runs first, and gives its place up last, -100..=100.
    pub priority: i32,
    /// The name of the adapter that the request runs with, or its path.
    pub adapter: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_tokens: None,
            min_tokens: 0,
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            n: 1,
            logprobs: false,
            top_logprobs: 0,
            prompt_logprobs: false,
            skip_special_tokens: true,
            add_special_tokens: None,
            timeout: None,
            priority: 0,
            adapter: None,
        }
    }
}

impl Options {
    /// Read a request's options: a JSON object, every field optional, `null` = unset.
    ///
    /// # Errors
    /// `UnknownOption` with the nearest known name; `InvalidRequest` saying what was wanted and
    /// what came.
    pub fn parse(options: &Value, defaults: &Defaults) -> Result<Self> {
        let fields = Fields::of("options", options)?;
        fields.refuse_unknown()?;
        let sampling = Sampling::read(&fields, defaults)?;
        let max_tokens = fields
            .count("max_tokens", 1..=u32::MAX as u64)?
            .or(defaults.max_tokens);
        let (logprobs, top_logprobs) = fields.logprobs()?;
        Ok(Self {
            max_tokens,
            min_tokens: fields.min_tokens(max_tokens)?,
            do_sample: sampling.on,
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            typical_p: sampling.typical_p,
            repetition_penalty: fields
                .number("repetition_penalty", Above(0.0))?
                .unwrap_or(defaults.repetition_penalty),
            frequency_penalty: fields
                .number("frequency_penalty", Between(-2.0, 2.0))?
                .unwrap_or(0.0),
            presence_penalty: fields
                .number("presence_penalty", Between(-2.0, 2.0))?
                .unwrap_or(0.0),
            logit_bias: fields.logit_bias()?,
            seed: fields.integer("seed", 0..=u64::MAX)?,
            stop: fields.stop()?,
            stop_token_ids: fields.ids("stop_token_ids")?,
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
            n: fields.count("n", 1..=MAX_COMPLETIONS)?.unwrap_or(1),
            logprobs,
            top_logprobs,
            prompt_logprobs: fields.flag("prompt_logprobs")?.unwrap_or(false),
            skip_special_tokens: fields.flag("skip_special_tokens")?.unwrap_or(true),
            add_special_tokens: fields.flag("add_special_tokens")?,
            timeout: fields
                .number("timeout", AboveTo(0.0, MAX_TIMEOUT_SECONDS))?
                .map(Duration::from_secs_f64),
            priority: fields.signed("priority", -100..=100)?.unwrap_or(0),
            adapter: fields.text("adapter")?,
        })
    }
}

/// How the next token is chosen, as the request and the model's defaults together say.
struct Sampling {
    on: bool,
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    typical_p: f64,
}

impl Sampling {
    fn read(fields: &Fields, defaults: &Defaults) -> Result<Self> {
        let temperature = fields.number("temperature", AtLeast(0.0))?;
        let top_k = fields.count("top_k", 0..=u32::MAX as u64)?;
        let top_p = fields.number("top_p", AboveTo(0.0, 1.0))?;
        let min_p = fields.number("min_p", Between(0.0, 1.0))?;
        let typical_p = fields.number("typical_p", AboveTo(0.0, 1.0))?;
        let do_sample = fields.flag("do_sample")?;

        // The first option that would shape a sampled text; 1 is the temperature that does not.
        let acting = [
            (
                "temperature",
                temperature.is_some_and(|t| t != 0.0 && t != 1.0),
            ),
            ("top_k", top_k.is_some_and(|k| k > 0)),
            ("top_p", top_p.is_some_and(|p| p < 1.0)),
            ("min_p", min_p.is_some_and(|p| p > 0.0)),
            ("typical_p", typical_p.is_some_and(|p| p < 1.0)),
        ]
        .into_iter()
        .find_map(|(name, acts)| acts.then_some(name));

        if let (Some(false), Some(name), false) = (do_sample, acting, temperature == Some(0.0)) {
            return Err(Error::InvalidRequest(format!(
                "do_sample is false, so {name} {} would do nothing; leave one of them out",
                shown(fields.map.get(name).unwrap_or(&Value::Null))
            )));
        }
        let asked = acting.is_some() || temperature.is_some();
        let temperature = temperature.unwrap_or(defaults.temperature);
        Ok(Self {
            on: temperature > 0.0 && do_sample.unwrap_or(asked || defaults.do_sample),
            temperature,
            top_k: top_k.unwrap_or(defaults.top_k),
            top_p: top_p.unwrap_or(defaults.top_p),
            min_p: min_p.unwrap_or(defaults.min_p),
            typical_p: typical_p.unwrap_or(defaults.typical_p),
        })
    }
}

/// The range a number must lie in.
enum Range {
    AtLeast(f64),
    Above(f64),
    /// Both ends belong to it.
    Between(f64, f64),
    /// The upper end belongs to it, the lower does not.
    AboveTo(f64, f64),
}
use Range::{Above, AboveTo, AtLeast, Between};

impl Range {
    fn holds(&self, x: f64) -> bool {
        match *self {
            AtLeast(low) => x >= low,
            Above(low) => x > low,
            Between(low, high) => low <= x && x <= high,
            AboveTo(low, high) => low < x && x <= high,
        }
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            AtLeast(low) => write!(f, "at least {low}"),
            Above(low) => write!(f, "above {low}"),
            Between(low, high) => write!(f, "from {low} to {high}"),
            AboveTo(low, high) => write!(f, "above {low} and at most {high}"),
        }
    }
}

/// A JSON object read field by field, with errors that name the field.
struct Fields<'a> {
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn of(what: &str, value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map }),
            other => Err(wanted(what, "an object", other)),
        }
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn refuse_unknown(&self) -> Result<()> {
        match self
            .map
            .keys()
            .find(|key| !OPTION_NAMES.contains(&key.as_str()))
        {
            None => Ok(()),
            Some(name) => {
                let nearest = nearest(name, OPTION_NAMES).map(str::to_owned);
                Err(Error::UnknownOption {
                    name: name.clone(),
                    nearest,
                })
            }
        }
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wanted(name, "true or false", other)),
        }
    }

    fn number(&self, name: &str, range: Range) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_f64().filter(|x| x.is_finite()) {
            None => Err(wanted(name, "a finite number", value)),
            Some(x) if range.holds(x) => Ok(Some(x)),
            Some(_) => Err(wanted(name, &range.to_string(), value)),
        }
    }

    fn integer(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let (low, high) = (*range.start(), *range.end());
        match (value.as_u64(), value.as_i64()) {
            (None, None) => Err(wanted(name, "an integer", value)),
            (Some(x), _) if range.contains(&x) => Ok(Some(x)),
            (Some(x), _) if x > high => Err(wanted(name, &format!("at most {high}"), value)),
            _ => Err(wanted(name, &format!("at least {low}"), value)),
        }
    }

    fn signed(&self, name: &str, range: RangeInclusive<i32>) -> Result<Option<i32>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let whole = value.as_i64().and_then(|n| i32::try_from(n).ok());
        match whole.filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let (low, high) = (range.start(), range.end());
                let range = format!("an integer from {low} to {high}");
                Err(wanted(name, &range, value))
            }
        }
    }

    fn count(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<usize>> {
        Ok(self.integer(name, range)?.map(|n| n as usize))
    }

    fn min_tokens(&self, max_tokens: Option<usize>) -> Result<usize> {
        let min = self.count("min_tokens", 0..=u32::MAX as u64)?.unwrap_or(0);
        match max_tokens {
            Some(max) if min > max => Err(Error::InvalidRequest(format!(
                "min_tokens must be at most max_tokens {max}, got {min}"
            ))),
            _ => Ok(min),
        }
    }

    /// Asking for alternatives asks for log probabilities; refusing those while asking is odd.
    fn logprobs(&self) -> Result<(bool, usize)> {
        let top = self
            .count("top_logprobs", 0..=MAX_TOP_LOGPROBS)?
            .unwrap_or(0);
        match self.flag("logprobs")? {
            Some(false) if top > 0 => Err(Error::InvalidRequest(format!(
                "top_logprobs {top} needs logprobs true, got false"
            ))),
            flag => Ok((flag.unwrap_or(top > 0), top)),
        }
    }

    fn stop(&self) -> Result<Vec<String>> {
        let texts: Vec<&Value> = match self.get("stop") {
            None => return Ok(Vec::new()),
            Some(Value::Array(texts)) => texts.iter().collect(),
            Some(one) => vec![one],
        };
        if texts.len() > MAX_STOPS {
            let message = format!(
                "stop must hold at most {MAX_STOPS} strings, got {}",
                texts.len()
            );
            return Err(Error::InvalidRequest(message));
        }
        texts.into_iter().map(stop_string).collect()
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) if !text.is_empty() => Ok(Some(text.clone())),
            Some(other) => Err(wanted(name, "a text that is not empty", other)),
        }
    }

    fn ids(&self, name: &str) -> Result<Vec<u32>> {
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(|id| token_id(name, id)).collect(),
            Some(other) => Err(wanted(name, "a list of token ids", other)),
        }
    }

    fn logit_bias(&self) -> Result<Vec<(u32, f32)>> {
        let map = match self.get("logit_bias") {
            None => return Ok(Vec::new()),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(wanted("logit_bias", "an object {token id: bias}", other)),
        };
        let range = Between(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS);
        map.iter()
            .map(|(key, value)| {
                let id = key.parse::<u32>().map_err(|_| {
                    wanted(
                        "a key of logit_bias",
                        "a token id",
                        &Value::String(key.clone()),
                    )
                })?;
                match value.as_f64() {
                    Some(bias) if range.holds(bias) => Ok((id, bias as f32)),
                    _ => Err(wanted(
                        &format!("logit_bias of {id}"),
                        &range.to_string(),
                        value,
                    )),
                }
            })
            .collect()
    }

    /// Files write -1 as well as 0 for "off".
    fn top_k_of_file(&self) -> Result<Option<usize>> {
        match self.get("top_k").and_then(Value::as_i64) {
            Some(-1) => Ok(Some(0)),
            _ => self.count("top_k", 0..=u32::MAX as u64),
        }
    }

    /// One id or several; old files write -1 for "none".
    fn eos_ids_of_file(&self) -> Result<Vec<u32>> {
        let ids: Vec<&Value> = match self.get("eos_token_id") {
            None => return Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().collect(),
            Some(one) => vec![one],
        };
        ids.into_iter()
            .filter(|id| id.as_i64() != Some(-1))
            .map(|id| token_id("eos_token_id", id))
            .collect()
    }
}

fn stop_string(value: &Value) -> Result<String> {
    match value {
        Value::String(text) if text.is_empty() => Err(Error::InvalidRequest(
            "stop must not be empty, got \"\"".into(),
        )),
        Value::String(text) if text.len() > MAX_STOP_BYTES => Err(Error::InvalidRequest(format!(
            "stop must have at most {MAX_STOP_BYTES} bytes, got {}",
            text.len()
        ))),
        Value::String(text) => Ok(text.clone()),
        other => Err(wanted("stop", "a string or a list of strings", other)),
    }
}

fn token_id(name: &str, value: &Value) -> Result<u32> {
    value
        .as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| wanted(name, "a token id", value))
}

fn wanted(name: &str, what: &str, got: &Value) -> Error {
    Error::InvalidRequest(format!("{name} must be {what}, got {}", shown(got)))
}

/// A value for a message: as JSON, cut where it gets long.
fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    match value {
        Value::Array(list) if list.len() > LONGEST => format!("a list of {}", list.len()),
        Value::Object(map) if map.len() > LONGEST => format!("an object of {}", map.len()),
        value => {
            let text = value.to_string();
            match text.char_indices().nth(LONGEST) {
                None => text,
                Some((end, _)) => format!("{}...", &text[..end]),
            }
        }
    }
}

/// The known name a misspelt one most likely means; none when nothing is near.
pub fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    const LONGEST: usize = 64;
    if name.chars().count() > LONGEST {
        return None;
    }
    let (distance, best) = known
        .iter()
        .map(|candidate| (edits(name, candidate), *candidate))
        .min()?;
    (distance <= name.chars().count() / 3).then_some(best)
}

/// Letters to insert, drop or change to get from one name to the other (Levenshtein).
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let change = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(options: Value) -> Result<Options> {
        Options::parse(&options, &Defaults::default())
    }

    fn message(options: Value) -> String {
        parse(options).expect_err("refused").to_string()
    }

    #[test]
    fn an_empty_object_is_greedy_and_unlimited() {
        let options = parse(json!({})).unwrap();
        assert!(!options.do_sample);
        assert_eq!(options.max_tokens, None);
        assert_eq!(
            options,
            Options {
                top_k: 50,
                ..Options::default()
            }
        );
    }

    #[test]
    fn null_means_unset() {
        let nulls: Map<String, Value> = OPTION_NAMES
            .iter()
            .map(|name| (name.to_string(), Value::Null))
            .collect();
        assert_eq!(
            parse(Value::Object(nulls)).unwrap(),
            parse(json!({})).unwrap()
        );
    }

    #[test]
    fn every_known_option_is_read() {
        let all = json!({
            "max_tokens": 9, "min_tokens": 2, "do_sample": true, "temperature": 0.5, "top_k": 7,
            "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.1,
            "frequency_penalty": -1.5, "presence_penalty": 2, "logit_bias": {"5": -100, "6": 1.5},
            "seed": u64::MAX, "stop": ["a", "bc"], "stop_token_ids": [3], "ignore_eos": true,
            "n": 3, "logprobs": true, "top_logprobs": 4, "prompt_logprobs": true, "skip_special_tokens": false,
            "add_special_tokens": false, "timeout": 1.5, "priority": -3, "adapter": "legal",
        });
        assert_eq!(all.as_object().unwrap().len(), OPTION_NAMES.len());
        let wanted = Options {
            max_tokens: Some(9),
            min_tokens: 2,
            do_sample: true,
            temperature: 0.5,
            top_k: 7,
            top_p: 0.9,
            min_p: 0.1,
            typical_p: 0.8,
            repetition_penalty: 1.1,
            frequency_penalty: -1.5,
            presence_penalty: 2.0,
            logit_bias: vec![(5, -100.0), (6, 1.5)],
            seed: Some(u64::MAX),
            stop: vec!["a".into(), "bc".into()],
            stop_token_ids: vec![3],
            ignore_eos: true,
            n: 3,
            logprobs: true,
            top_logprobs: 4,
            prompt_logprobs: true,
            skip_special_tokens: false,
            add_special_tokens: Some(false),
            timeout: Some(Duration::from_millis(1500)),
            priority: -3,
            adapter: Some("legal".into()),
        };
        assert_eq!(parse(all).unwrap(), wanted);
    }

    #[test]
    fn an_unknown_option_gets_the_nearest_name_if_one_is_near() {
        let error = parse(json!({"temprature": 0.5})).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown option \"temprature\"; did you mean \"temperature\"?"
        );
        assert!(message(json!({"max_new_tokens": 5})).contains("\"max_tokens\""));
        assert_eq!(message(json!({"colour": 1})), "unknown option \"colour\"");
        assert_eq!(nearest(&"x".repeat(1_000_000), OPTION_NAMES), None);
    }

    #[test]
    fn a_bad_value_is_refused_with_what_was_wanted_and_what_came() {
        for (options, wanted) in [
            (
                json!({"max_tokens": 0}),
                "max_tokens must be at least 1, got 0",
            ),
            (
                json!({"max_tokens": -3}),
                "max_tokens must be at least 1, got -3",
            ),
            (
                json!({"max_tokens": "ten"}),
                "max_tokens must be an integer, got \"ten\"",
            ),
            (
                json!({"max_tokens": 1.5}),
                "max_tokens must be an integer, got 1.5",
            ),
            (
                json!({"max_tokens": 1u64 << 40}),
                "max_tokens must be at most 4294967295",
            ),
            (
                json!({"min_tokens": 5, "max_tokens": 4}),
                "min_tokens must be at most max_tokens 4",
            ),
            (
                json!({"temperature": -0.1}),
                "temperature must be at least 0, got -0.1",
            ),
            (
                json!({"temperature": true}),
                "temperature must be a finite number, got true",
            ),
            (
                json!({"top_p": 0}),
                "top_p must be above 0 and at most 1, got 0",
            ),
            (
                json!({"top_p": 1.01}),
                "top_p must be above 0 and at most 1, got 1.01",
            ),
            (
                json!({"min_p": -0.1}),
                "min_p must be from 0 to 1, got -0.1",
            ),
            (
                json!({"typical_p": 0.0}),
                "typical_p must be above 0 and at most 1, got 0.0",
            ),
            (json!({"top_k": -1}), "top_k must be at least 0, got -1"),
            (
                json!({"repetition_penalty": 0}),
                "repetition_penalty must be above 0, got 0",
            ),
            (
                json!({"frequency_penalty": 2.5}),
                "frequency_penalty must be from -2 to 2, got 2.5",
            ),
            (
                json!({"presence_penalty": -3}),
                "presence_penalty must be from -2 to 2, got -3",
            ),
            (json!({"seed": -1}), "seed must be at least 0, got -1"),
            (json!({"stop": ""}), "stop must not be empty"),
            (json!({"stop": ["a", ""]}), "stop must not be empty"),
            (
                json!({"stop": [1]}),
                "stop must be a string or a list of strings, got 1",
            ),
            (
                json!({"stop": vec!["x"; 65]}),
                "stop must hold at most 64 strings, got 65",
            ),
            (
                json!({"stop": "x".repeat(5000)}),
                "stop must have at most 4096 bytes, got 5000",
            ),
            (
                json!({"stop_token_ids": [-1]}),
                "stop_token_ids must be a token id, got -1",
            ),
            (json!({"n": 0}), "n must be at least 1, got 0"),
            (json!({"n": 129}), "n must be at most 128, got 129"),
            (
                json!({"top_logprobs": 21}),
                "top_logprobs must be at most 20, got 21",
            ),
            (
                json!({"top_logprobs": 2, "logprobs": false}),
                "top_logprobs 2 needs logprobs true",
            ),
            (
                json!({"prompt_logprobs": 1}),
                "prompt_logprobs must be true or false, got 1",
            ),
            (
                json!({"logprobs": 5}),
                "logprobs must be true or false, got 5",
            ),
            (
                json!({"logit_bias": {"x": 1}}),
                "a key of logit_bias must be a token id, got \"x\"",
            ),
            (
                json!({"logit_bias": {"1": 101}}),
                "logit_bias of 1 must be from -100 to 100, got 101",
            ),
            (
                json!({"timeout": 0}),
                "timeout must be above 0 and at most 1000000000, got 0",
            ),
            (
                json!({"priority": 101}),
                "priority must be an integer from -100 to 100, got 101",
            ),
            (
                json!({"priority": 1.5}),
                "priority must be an integer from -100 to 100, got 1.5",
            ),
            (json!([1]), "options must be an object, got [1]"),
        ] {
            let message = message(options);
            assert!(
                message.starts_with(wanted),
                "{message:?} should start with {wanted:?}"
            );
        }
    }

    #[test]
    fn a_long_value_is_cut_in_the_message() {
        assert!(message(json!({"max_tokens": "é".repeat(10_000)})).len() < 200);
        assert!(message(json!({"max_tokens": vec![0; 10_000]})).ends_with("a list of 10000"));
    }

    #[test]
    fn a_sampling_option_that_acts_turns_sampling_on() {
        for options in [
            json!({"temperature": 0.7}),
            json!({"temperature": 1}),
            json!({"top_p": 0.9}),
            json!({"top_k": 5}),
            json!({"min_p": 0.1}),
            json!({"typical_p": 0.9}),
        ] {
            assert!(parse(options.clone()).unwrap().do_sample, "{options}");
        }
        for options in [
            json!({"top_p": 1.0}),
            json!({"top_k": 0}),
            json!({"seed": 1}),
        ] {
            assert!(!parse(options.clone()).unwrap().do_sample, "{options}");
        }
    }

    #[test]
    fn temperature_zero_is_greedy_whatever_else_is_set() {
        let sampled = Defaults {
            do_sample: true,
            ..Defaults::default()
        };
        for options in [
            json!({"temperature": 0}),
            json!({"temperature": 0.0, "top_p": 0.9}),
            json!({"temperature": 0, "do_sample": true}),
            json!({"temperature": 0, "do_sample": false, "top_k": 3}),
        ] {
            assert!(
                !Options::parse(&options, &sampled).unwrap().do_sample,
                "{options}"
            );
        }
    }

    #[test]
    fn do_sample_false_beside_a_sampling_option_is_refused_by_name() {
        assert_eq!(
            message(json!({"do_sample": false, "top_p": 0.9})),
            "do_sample is false, so top_p 0.9 would do nothing; leave one of them out"
        );
        assert!(
            message(json!({"do_sample": false, "temperature": 0.7})).contains("temperature 0.7")
        );
        let neutral = json!({"do_sample": false, "temperature": 1.0, "top_p": 1.0, "top_k": 0});
        assert!(!parse(neutral).unwrap().do_sample);
    }

    #[test]
    fn the_models_defaults_apply_where_the_request_is_silent() {
        let config = json!({
            "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 100,
            "repetition_penalty": 1.05, "eos_token_id": [2, 7], "transformers_version": "5.0", "min_p": null,
        });
        let defaults = Defaults::from_generation_config(&config).unwrap();
        assert_eq!(defaults.eos_token_ids, [2, 7]);
        let options = Options::parse(&json!({"top_p": 0.5}), &defaults).unwrap();
        assert!(options.do_sample);
        assert_eq!(
            (options.temperature, options.top_k, options.top_p),
            (0.6, 20, 0.5)
        );
        assert_eq!(
            (options.max_tokens, options.repetition_penalty),
            (Some(100), 1.05)
        );
        let greedy = Options::parse(&json!({"do_sample": false}), &defaults).unwrap();
        assert!(!greedy.do_sample);
    }

    #[test]
    fn a_generation_config_may_be_odd_but_not_wrong() {
        let read = |config| Defaults::from_generation_config(&config);
        assert_eq!(read(json!({})).unwrap(), Defaults::default());
        assert_eq!(read(json!({"eos_token_id": 5})).unwrap().eos_token_ids, [5]);
        assert_eq!(
            read(json!({"eos_token_id": -1, "top_k": -1}))
                .unwrap()
                .top_k,
            0
        );
        let zero = read(json!({"do_sample": true, "temperature": 0})).unwrap();
        assert_eq!((zero.do_sample, zero.temperature), (false, 1.0));
        assert_eq!(
            read(json!({"temperature": "hot"})).unwrap_err().to_string(),
            "generation_config.json: temperature must be a finite number, got \"hot\""
        );
    }
}
