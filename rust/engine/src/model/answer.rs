//! What a request asks of the answer's form: tools, schemas, grammars, thoughts. Makes a rule and a parser of it.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::constraint::{Grammars, Marker, Rule, Source, schema_rule};
use crate::error::{Error, Result};
use crate::options::Options;
use crate::response::{Lark, Parser, Style, Thinking, Tool, ToolChoice, tools_of};

/// The options that say what the text must be, and how each is read; none: any text will do.
type Read = fn(Value) -> Result<Option<Source>>;
const SOURCES: [(&str, Read); 4] = [
    ("response_format", |value| format(&value)),
    ("regex", |value| {
        Ok(Some(Source::Regex(text("regex", value)?)))
    }),
    ("choice", |value| Ok(Some(choices(value)?))),
    ("grammar", |value| {
        Ok(Some(Source::Lark(text("grammar", value)?)))
    }),
];

/// The options that say it.
#[derive(Debug)]
pub struct Answer {
    /// Those that may be called.
    pub tools: Vec<Tool>,
    choice: ToolChoice,
    several: bool,
    /// What the text has to be where it is not a call, and the option that says so.
    source: Option<(&'static str, Source)>,
    style: Option<&'static Style>,
    /// Whether thoughts are wanted; none: as the model does.
    pub reasoning: Option<bool>,
}

impl Answer {
    /// Take the options of this file out of a request's.
    ///
    /// # Errors
    /// `InvalidRequest` for what is malformed or contradicts itself.
    pub fn take(options: &mut Map<String, Value>) -> Result<Self> {
        let mut take = |key: &str| options.remove(key).filter(|value| !value.is_null());
        let tools = take("tools").map_or(Ok(Vec::new()), |list| tools_of(&list))?;
        let choice = match take("tool_choice") {
            Some(choice) => ToolChoice::parse(&choice, &tools)?,
            None if tools.is_empty() => ToolChoice::None,
            None => ToolChoice::Auto,
        };
        let flag = |key: &str, value: Option<Value>| match value {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong(key, "true or false", &other)),
        };
        let several = flag("parallel_tool_calls", take("parallel_tool_calls"))?;
        if several.is_some() && tools.is_empty() {
            return Err(Error::InvalidRequest(
                "parallel_tool_calls needs tools".into(),
            ));
        }
        let reasoning = flag("reasoning", take("reasoning"))?;
        let style = match take("tool_style") {
            None => None,
            Some(Value::String(name)) => Some(Style::named(&name)?),
            Some(other) => return Err(wrong("tool_style", "a name", &other)),
        };
        let mut sources = Vec::new();
        for (key, read) in SOURCES {
            if let Some(source) = take(key).map(read).transpose()?.flatten() {
                sources.push((key, source));
            }
        }
        if let [(one, _), (other, _), ..] = &sources[..] {
            return Err(Error::InvalidRequest(format!(
                "{one} and {other} cannot both say what the text must be"
            )));
        }
        let answer = Self {
            // A call that is forced is one, where nothing is said: a weak model would go on calling.
            several: several.unwrap_or(matches!(choice, ToolChoice::Auto)),
            tools: if matches!(choice, ToolChoice::None) {
                Vec::new()
            } else {
                tools
            },
            choice,
            source: sources.pop(),
            style,
            reasoning,
        };
        answer.check()?;
        Ok(answer)
    }

    fn check(&self) -> Result<()> {
        match (&self.source, self.tools.is_empty()) {
            (Some((name, _)), false) if *name != "response_format" => {
                Err(Error::InvalidRequest(format!(
                    "{name} and tools cannot be combined; give tool_choice \"none\", or no tools"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Refuse what only a grammar makes sure of.
    ///
    /// # Errors
    /// `InvalidRequest` that names it.
    pub fn refuse_bound(&self) -> Result<()> {
        let forced = matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_));
        let bound = match &self.source {
            Some((name, _)) => name,
            None if forced => "a tool_choice that forces a call",
            None if self.choice == ToolChoice::Auto && !self.several => "parallel_tool_calls false",
            None => return Ok(()),
        };
        Err(Error::InvalidRequest(format!(
            "{bound} needs a grammar, which this backend does not make a model follow"
        )))
    }

    /// Whether anything but plain text may come of it.
    pub fn shapes_text(&self) -> bool {
        !self.tools.is_empty() || self.source.is_some()
    }

    /// The way its calls are written: as the request says, else as the checkpoint does.
    pub fn style(&self, checkpoint: &'static Style) -> &'static Style {
        self.style.unwrap_or(checkpoint)
    }

    /// What the text must be; `begun`: the prompt ends inside a thought.
    ///
    /// # Errors
    /// `InvalidRequest` for grammars and schemas that cannot be used, and for options that would break the text.
    pub fn rule(
        &self,
        style: &'static Style,
        begun: bool,
        grammars: &Arc<Grammars>,
        options: &Options,
    ) -> Result<Option<Rule>> {
        let Some(rule) = self.rule_after_thoughts(style, grammars)? else {
            return Ok(None);
        };
        if matches!(rule, Rule::Grammar(_)) {
            self.refuse_cuts(options)?;
        }
        let Some((_, close)) = style.thought().filter(|_| begun) else {
            return Ok(Some(rule));
        };
        let must = matches!(rule, Rule::Grammar(_));
        Ok(Some(Rule::Until {
            markers: vec![(marker(grammars, close), rule)],
            must,
        }))
    }

    fn rule_after_thoughts(
        &self,
        style: &'static Style,
        grammars: &Arc<Grammars>,
    ) -> Result<Option<Rule>> {
        let words = Words { grammars };
        let tools: Vec<&Tool> = match &self.choice {
            ToolChoice::Named(name) => self
                .tools
                .iter()
                .filter(|tool| tool.name == *name)
                .collect(),
            _ => self.tools.iter().collect(),
        };
        let source = self.source.as_ref().map(|(_, source)| source);
        let lark = match (&self.choice, source) {
            (ToolChoice::None, None) => return Ok(None),
            (ToolChoice::None, Some(source)) => source.lark()?,
            (ToolChoice::Auto, None) => {
                let mut markers = Vec::new();
                for (opening, lark) in style.trigger(&tools, self.several, &words)? {
                    markers.push((
                        marker(grammars, &opening),
                        Rule::Grammar(grammars.compile(&lark)?),
                    ));
                }
                return Ok(Some(Rule::Until {
                    markers,
                    must: false,
                }));
            }
            (ToolChoice::Auto, Some(source)) => {
                let calls = style.calls_grammar(&tools, self.several, &words)?;
                either(&calls, &source.lark()?)
            }
            (ToolChoice::Required | ToolChoice::Named(_), _) => {
                style.calls_grammar(&tools, self.several, &words)?
            }
        };
        Ok(Some(Rule::Grammar(grammars.compile(&lark)?)))
    }

    /// What would end the text in the middle of its grammar.
    fn refuse_cuts(&self, options: &Options) -> Result<()> {
        let cuts = [
            ("stop", !options.stop.is_empty()),
            ("stop_token_ids", !options.stop_token_ids.is_empty()),
            ("min_tokens", options.min_tokens > 0),
            ("ignore_eos", options.ignore_eos),
        ];
        let reason = match &self.source {
            Some((name, _))
                if !matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_)) =>
            {
                name
            }
            _ => "a forced tool call",
        };
        match cuts.iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((name, _)) => Err(Error::InvalidRequest(format!(
                "{name} cannot be combined with {reason}, which alone says where the text ends"
            ))),
        }
    }

    /// What tells text, thoughts and calls apart; none where all is text.
    pub fn parser(&self, style: &'static Style, thinking: Thinking) -> Option<Parser> {
        let calls = !self.tools.is_empty();
        (calls || thinking != Thinking::Off).then(|| style.parser(&self.tools, calls, thinking))
    }
}

fn marker(grammars: &Grammars, text: &str) -> Marker {
    match grammars.special(text) {
        Some(id) => Marker::Token(id),
        None => Marker::Text(text.to_string()),
    }
}

/// A grammar of calls, or one of something else.
fn either(calls: &str, other: &str) -> String {
    let renamed = |lark: &str, name: &str| {
        let lines = lark.lines().map(|line| match line.strip_prefix("start:") {
            Some(rest) => format!("{name}:{rest}\n"),
            None => format!("{line}\n"),
        });
        lines.collect::<String>()
    };
    format!(
        "start: all_calls | no_call\n{}{}",
        renamed(calls, "all_calls"),
        renamed(other, "no_call")
    )
}

/// Words and schemas for a style's grammar.
struct Words<'a> {
    grammars: &'a Grammars,
}

impl Lark for Words<'_> {
    fn literal(&self, text: &str) -> String {
        self.grammars.literal(text)
    }

    fn schema(&self, schema: &Value) -> Result<String> {
        schema_rule(schema)
    }
}

fn wrong(key: &str, wanted: &str, got: &Value) -> Error {
    let mut shown = got.to_string();
    if let Some((end, _)) = shown.char_indices().nth(80) {
        shown.truncate(end);
    }
    Error::InvalidRequest(format!("{key} must be {wanted}, got {shown}"))
}

fn text(key: &str, value: Value) -> Result<String> {
    match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        other => Err(wrong(key, "a text that is not empty", &other)),
    }
}

fn choices(value: Value) -> Result<Source> {
    let Value::Array(list) = &value else {
        return Err(wrong("choice", "a list of texts", &value));
    };
    let texts = list.iter().map(|text| text.as_str().map(str::to_string));
    match texts.collect() {
        Some(texts) => Ok(Source::Choice(texts)),
        None => Err(wrong("choice", "a list of texts", &value)),
    }
}

/// OpenAI's response_format; none for text.
fn format(value: &Value) -> Result<Option<Source>> {
    let kinds = "{\"type\": \"text\"}, {\"type\": \"json_object\"} or {\"type\": \"json_schema\", \"json_schema\": {\"schema\": ...}}";
    match value.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Source::JsonObject)),
        Some("json_schema") => {
            let named = value.get("json_schema").unwrap_or(value);
            match named.get("schema") {
                Some(schema @ (Value::Object(_) | Value::Bool(_))) => {
                    Ok(Some(Source::JsonSchema(schema.clone())))
                }
                _ => Err(wrong("response_format", kinds, value)),
            }
        }
        _ => Err(wrong("response_format", kinds, value)),
    }
}

/// A conversation for a template that lists no tools: how to call them stands in the system message; calls and results
/// in the text, unless the `template` writes those itself.
pub fn spell_out(messages: &Value, tools: Option<&Value>, style: &Style, template: &str) -> Value {
    let Some(list) = messages.as_array() else {
        return messages.clone();
    };
    let mut told: Vec<Value> = match template.contains("tool_calls") {
        true => list.clone(),
        false => list.iter().map(|message| spelled(message, style)).collect(),
    };
    if let Some(tools) = tools {
        let text = style.instructions(tools);
        match told.first_mut().filter(|m| m["role"] == "system") {
            Some(system) => {
                let before = system["content"].as_str().unwrap_or_default();
                system["content"] = json!(format!("{before}\n\n{text}").trim());
            }
            None => told.insert(0, json!({"role": "system", "content": text})),
        }
    }
    Value::Array(told)
}

fn spelled(message: &Value, style: &Style) -> Value {
    let content = message
        .get("content")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if message["role"] == "tool" {
        return json!({"role": "user", "content": format!("<tool_response>\n{content}\n</tool_response>")});
    }
    let Some(calls) = message
        .get("tool_calls")
        .and_then(Value::as_array)
        .filter(|calls| !calls.is_empty())
    else {
        return message.clone();
    };
    let mut text = content.to_string();
    for call in calls {
        let function = call.get("function").unwrap_or(call);
        let name = function["name"].as_str().unwrap_or_default();
        if !text.is_empty() {
            text.push('\n');
        }
        let arguments = match &function["arguments"] {
            Value::String(json) => json.clone(),
            other => other.to_string(),
        };
        text.push_str(&style.call(name, &arguments));
    }
    json!({"role": "assistant", "content": text})
}
