//! How each model family writes tool calls and thoughts: a table, and how a checkpoint's files show which one is theirs.

use serde_json::Value;

use super::{Parser, Thinking, Tool};
use crate::error::{Error, Result};

/// How a family writes tool calls and thoughts. A turn of calls is
/// `open` call (`between` call)* `close`, and a call is `before` name `after` arguments `end`.
/// [`NUMBER`] stands for a number.
#[derive(Debug)]
pub struct Style {
    pub(super) name: &'static str,
    pub(super) thought: Option<(&'static str, &'static str)>,
    pub(super) open: &'static str,
    pub(super) before: &'static str,
    pub(super) after: &'static str,
    pub(super) arguments: Arguments,
    pub(super) end: &'static str,
    pub(super) between: &'static str,
    pub(super) close: &'static str,
    /// The head of `open` + `before` that shows, amid free text, that a call begins; empty where only a tool's
    /// name shows it.
    pub(super) trigger: &'static str,
    /// What may stand before a whole turn of calls, and shows one too.
    pub(super) lead: &'static str,
    /// Without any marker, the start of a turn may be a call.
    pub(super) bare: bool,
    /// Several calls in one turn can be written.
    pub(super) several: bool,
    /// Ids are nine letters and digits, nothing else.
    pub(super) short_ids: bool,
    /// The turn is made of messages in channels (harmony).
    pub(super) channels: bool,
    /// Marks around the answer's text, which are dropped wherever they stand.
    pub(super) frame: &'static [&'static str],
    /// Strings that may be one special token.
    pub(super) markers: &'static [&'static str],
}

/// How the arguments of a call are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arguments {
    /// One JSON object.
    Json,
    /// One JSON object, a member of an object that has the name too.
    Envelope,
    /// Each between tags.
    Tagged(Tags),
    /// Keyword arguments of Python.
    Python,
    /// `key:value`, with strings between `<|"|>` (Gemma 4).
    Gemma,
}

/// `key.0` name `key.1` value `value.0` `value.1` `value.2`; `value.1` is what ends a raw value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tags {
    pub(super) key: (&'static str, &'static str),
    /// What stands in place of `key.1` before a value in JSON, where that is told from a string.
    pub(super) json: Option<&'static str>,
    pub(super) value: (&'static str, &'static str, &'static str),
}

/// In `before` and `after`: any number, the call's in its turn as a rule.
pub(super) const NUMBER: char = '№';

/// Gemma 4's quote.
pub(super) const QUOTE: &str = "<|\"|>";
const THINK: Option<(&str, &str)> = Some(("<think>", "</think>"));

/// Hermes, on which the others are built.
const HERMES: Style = Style {
    name: "hermes",
    thought: THINK,
    open: "",
    before: "<tool_call>\n{\"name\": \"",
    after: "\", \"arguments\": ",
    arguments: Arguments::Envelope,
    end: "}\n</tool_call>",
    between: "\n",
    close: "",
    trigger: "<tool_call>",
    lead: "",
    bare: false,
    several: true,
    short_ids: false,
    channels: false,
    frame: &[],
    markers: &["<tool_call>", "</tool_call>"],
};

/// A list of objects with name and arguments.
const LIST: Style = Style {
    before: "{\"name\": \"",
    end: "}",
    between: ", ",
    close: "]",
    ..HERMES
};

const DEEPSEEK: Style = Style {
    name: "deepseek",
    open: "<｜tool▁calls▁begin｜>",
    before: "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    after: "\n```json\n",
    arguments: Arguments::Json,
    end: "\n```<｜tool▁call▁end｜>",
    between: "\n",
    close: "<｜tool▁calls▁end｜>",
    trigger: "<｜tool▁calls▁begin｜>",
    markers: &[
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ],
    ..HERMES
};

const GLM: Style = Style {
    name: "glm",
    before: "<tool_call>",
    after: "\n",
    arguments: Arguments::Tagged(Tags {
        key: ("<arg_key>", "</arg_key>\n<arg_value>"),
        json: None,
        value: ("", "</arg_value>", "\n"),
    }),
    end: "</tool_call>",
    markers: &[
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ],
    ..HERMES
};

const PYTHONIC: Style = Style {
    name: "pythonic",
    open: "[",
    before: "",
    after: "(",
    arguments: Arguments::Python,
    end: ")",
    between: ", ",
    close: "]",
    trigger: "",
    bare: true,
    markers: &[],
    ..HERMES
};

/// Every style; the first is the one taken where nothing shows another.
pub(super) static STYLES: &[Style] = &[
    HERMES,
    Style {
        name: "llama3_json",
        before: "{\"name\": \"",
        after: "\", \"parameters\": ",
        end: "}",
        trigger: "{\"name\": ",
        lead: "<|python_tag|>",
        bare: true,
        several: false,
        markers: &["<|python_tag|>"],
        ..HERMES
    },
    PYTHONIC,
    Style {
        name: "lfm2",
        open: "<|tool_call_start|>[",
        close: "]<|tool_call_end|>",
        trigger: "<|tool_call_start|>",
        bare: false,
        markers: &["<|tool_call_start|>", "<|tool_call_end|>"],
        ..PYTHONIC
    },
    Style {
        name: "mistral",
        thought: Some(("[THINK]", "[/THINK]")),
        open: "[TOOL_CALLS][",
        trigger: "[TOOL_CALLS]",
        short_ids: true,
        markers: &["[TOOL_CALLS]"],
        ..LIST
    },
    Style {
        name: "mistral_named",
        thought: Some(("[THINK]", "[/THINK]")),
        before: "[TOOL_CALLS]",
        after: "[ARGS]",
        arguments: Arguments::Json,
        end: "",
        between: "",
        trigger: "[TOOL_CALLS]",
        short_ids: true,
        markers: &["[TOOL_CALLS]", "[ARGS]"],
        ..HERMES
    },
    Style {
        name: "qwen3_coder",
        before: "<tool_call>\n<function=",
        after: ">\n",
        arguments: Arguments::Tagged(Tags {
            key: ("<parameter=", ">\n"),
            json: None,
            value: ("\n", "</parameter>", "\n"),
        }),
        end: "</function>\n</tool_call>",
        ..HERMES
    },
    DEEPSEEK,
    Style {
        name: "deepseek_v31",
        before: "<｜tool▁call▁begin｜>",
        after: "<｜tool▁sep｜>",
        end: "<｜tool▁call▁end｜>",
        between: "",
        ..DEEPSEEK
    },
    Style {
        name: "phi4",
        open: "<|tool_call|>[",
        close: "]<|/tool_call|>",
        trigger: "<|tool_call|>",
        markers: &["<|tool_call|>", "<|/tool_call|>"],
        ..LIST
    },
    Style {
        name: "functools",
        open: "functools[",
        trigger: "functools[",
        markers: &[],
        ..LIST
    },
    Style {
        name: "granite",
        open: "<|tool_call|>[",
        trigger: "<|tool_call|>",
        markers: &["<|tool_call|>"],
        ..LIST
    },
    Style {
        name: "granite_fc",
        before: "<function_call> {\"name\": \"",
        end: "}",
        between: "",
        trigger: "<function_call>",
        markers: &["<function_call>"],
        ..HERMES
    },
    Style {
        name: "apriel",
        open: "<tool_calls>[",
        close: "]</tool_calls>",
        trigger: "<tool_calls>",
        markers: &["<tool_calls>", "</tool_calls>"],
        ..LIST
    },
    GLM,
    Style {
        name: "glm_tight",
        after: "",
        arguments: Arguments::Tagged(Tags {
            key: ("<arg_key>", "</arg_key><arg_value>"),
            json: None,
            value: ("", "</arg_value>", ""),
        }),
        between: "",
        ..GLM
    },
    Style {
        name: "seed",
        thought: Some(("<seed:think>", "</seed:think>")),
        before: "<seed:tool_call>\n<function=",
        after: ">\n",
        arguments: Arguments::Tagged(Tags {
            key: ("<parameter=", ">"),
            json: None,
            value: ("", "</parameter>", "\n"),
        }),
        end: "</function>\n</seed:tool_call>",
        trigger: "<seed:tool_call>",
        markers: &["<seed:tool_call>", "</seed:tool_call>"],
        ..HERMES
    },
    Style {
        name: "minimax",
        open: "<minimax:tool_call>\n",
        before: "<invoke name=\"",
        after: "\">\n",
        arguments: Arguments::Tagged(Tags {
            key: ("<parameter name=\"", "\">"),
            json: None,
            value: ("", "</parameter>", "\n"),
        }),
        end: "</invoke>\n",
        between: "",
        close: "</minimax:tool_call>",
        trigger: "<minimax:tool_call>",
        markers: &["<minimax:tool_call>", "</minimax:tool_call>"],
        ..HERMES
    },
    Style {
        name: "deepseek_v32",
        open: "<｜DSML｜function_calls>\n",
        before: "<｜DSML｜invoke name=\"",
        after: "\">\n",
        arguments: Arguments::Tagged(Tags {
            key: ("<｜DSML｜parameter name=\"", "\" string=\"true\">"),
            json: Some("\" string=\"false\">"),
            value: ("", "</｜DSML｜parameter>", "\n"),
        }),
        end: "</｜DSML｜invoke>\n",
        between: "",
        close: "</｜DSML｜function_calls>",
        trigger: "<｜DSML｜function_calls>",
        markers: &["｜DSML｜"],
        ..HERMES
    },
    Style {
        name: "kimi",
        open: "<|tool_calls_section_begin|>",
        before: "<|tool_call_begin|>functions.",
        after: ":№<|tool_call_argument_begin|>",
        arguments: Arguments::Json,
        end: "<|tool_call_end|>",
        between: "",
        close: "<|tool_calls_section_end|>",
        trigger: "<|tool_calls_section_begin|>",
        markers: &[
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ],
        ..HERMES
    },
    Style {
        name: "cohere",
        thought: Some(("<|START_THINKING|>", "<|END_THINKING|>")),
        open: "<|START_ACTION|>[\n    ",
        before: "{\"tool_call_id\": \"№\", \"tool_name\": \"",
        after: "\", \"parameters\": ",
        end: "}",
        between: ",\n    ",
        close: "\n]<|END_ACTION|>",
        trigger: "<|START_ACTION|>",
        frame: &["<|START_RESPONSE|>", "<|END_RESPONSE|>"],
        markers: &["<|START_ACTION|>", "<|END_ACTION|>"],
        ..HERMES
    },
    Style {
        name: "functionary",
        before: "<function=",
        after: ">",
        arguments: Arguments::Json,
        end: "</function>",
        between: "",
        trigger: "<function=",
        markers: &[],
        ..HERMES
    },
    Style {
        name: "gemma",
        thought: Some(("<|channel>thought", "<channel|>")),
        before: "<|tool_call>call:",
        after: "{",
        arguments: Arguments::Gemma,
        end: "}<tool_call|>",
        between: "",
        trigger: "<|tool_call>",
        markers: &["<|tool_call>", "<tool_call|>", QUOTE, "<|channel>"],
        ..HERMES
    },
    Style {
        name: "harmony",
        thought: Some(("<|channel|>analysis<|message|>", "<|end|>")),
        before: "<|channel|>commentary to=functions.",
        after: " <|constrain|>json<|message|>",
        arguments: Arguments::Json,
        end: "<|call|>",
        between: "",
        trigger: "<|channel|>commentary to=functions.",
        several: false,
        channels: true,
        frame: &["<|end|>", "<|return|>", "<|call|>"],
        markers: &[
            "<|channel|>",
            "<|message|>",
            "<|constrain|>",
            "<|start|>",
            "<|end|>",
            "<|call|>",
            "<|return|>",
        ],
        ..HERMES
    },
];

/// What in the source of a template shows a style, the surest first: all of the strings must be there.
static SIGNS: &[(&[&str], &str)] = &[
    (&["<|channel|>", "<|message|>"], "harmony"),
    (&["<|tool_call>"], "gemma"),
    (&["[TOOL_CALLS]", "[ARGS]"], "mistral_named"),
    (&["[TOOL_CALLS]"], "mistral"),
    (&["｜DSML｜", "string=\"true"], "deepseek_v32"),
    (&["tool▁sep", "```"], "deepseek"),
    (&["tool▁calls▁begin"], "deepseek_v31"),
    (&["<tool_call>", "</arg_key><arg_value>"], "glm_tight"),
    (&["<tool_call>", "<arg_key>"], "glm"),
    (&["<tool_call>", "<function="], "qwen3_coder"),
    (&["<tool_calls>[", "</tool_calls>"], "apriel"),
    (&["<tool_call>"], "hermes"),
    (&["<seed:tool_call>", "<function="], "seed"),
    (&["<minimax:tool_call>", "<invoke name=\""], "minimax"),
    (&["<|tool_calls_section_begin|>"], "kimi"),
    (&["<|START_ACTION|>", "tool_name"], "cohere"),
    (&["<function=", "}</function>"], "functionary"),
    (&["functools["], "functools"),
    (&["<|tool_call|>", "<|/tool_call|>"], "phi4"),
    (&["<|tool|>", "<|/tool|>"], "phi4"),
    (&["<|tool_call|>"], "granite"),
    (&["<function_call> "], "granite_fc"),
    (&["<|tool_call_start|>"], "lfm2"),
    (&["<|tool_list_start|>"], "lfm2"),
    (&["<|python_tag|>"], "llama3_json"),
    (&["<|start_header_id|>", "\"parameters\""], "llama3_json"),
    (&["[func_name1("], "pythonic"),
    (&["tool_call.name + '('"], "pythonic"),
];

impl Style {
    /// The style of this name.
    ///
    /// # Errors
    /// `Unsupported`, with every name there is.
    pub fn named(name: &str) -> Result<&'static Style> {
        Self::known(name).ok_or_else(|| Error::Unsupported {
            what: "style of tool calls",
            name: name.chars().take(64).collect(),
            supported: STYLES
                .iter()
                .map(|style| style.name)
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    fn known(name: &str) -> Option<&'static Style> {
        STYLES.iter().find(|style| style.name == name)
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The style of a chat template, by the markers in its source; hermes where none is seen, or where the
    /// template takes no tools and our own instructions ask for it.
    pub fn of_template(source: &str, takes_tools: bool) -> &'static Style {
        let seen = sign_in(source);
        // A template without tools leaves the wording to us, but what it does write of calls or channels stands.
        match seen {
            Some(style) if takes_tools || style.trigger != "{\"name\": " => style,
            _ => &STYLES[0],
        }
    }

    /// The style of a `response_template` (transformers 5.13: a table of fields with what opens and closes each) or its
    /// forerunner `response_schema` (a JSON schema with patterns), as a tokenizer's configuration has it; none where it is
    /// malformed, of a later version, or shows no style. Literals and patterns hold the same markers, the latter with a
    /// regex's backslashes.
    pub fn of_response_template(value: &Value) -> Option<&'static Style> {
        let spec = value.as_object()?;
        let version_1 = spec.get("version").is_none_or(|v| v.as_f64() == Some(1.0));
        let fields = ["fields", "properties"]
            .iter()
            .find_map(|key| spec.get(*key));
        let filled = fields
            .and_then(Value::as_object)
            .is_some_and(|f| !f.is_empty());
        if !version_1 || !(filled || spec.contains_key("x-regex")) {
            return None;
        }
        let mut text = String::new();
        gather_text(value, 0, &mut text);
        sign_in(&text.replace("\\s*", "").replace('\\', ""))
    }

    /// This style as `other`, a style of the same family, spells it: patterns leave open what a chat template shows.
    pub fn spelled_as(&'static self, other: &'static Style) -> &'static Style {
        let key = |style: &Style| match style.arguments {
            Arguments::Tagged(tags) => Some((style.trigger, tags.key.0)),
            _ => None,
        };
        match key(self).is_some() && key(self) == key(other) {
            true => other,
            false => self,
        }
    }

    /// Every string that may be a special token of the vocabulary and must be seen in the text all the same.
    pub fn markers(&self) -> Vec<&'static str> {
        let mut markers = self.markers.to_vec();
        if let (Some((open, close)), false) = (self.thought, self.channels) {
            // Gemma's opening is a token and a word.
            if self.arguments != Arguments::Gemma {
                markers.push(open);
            }
            markers.push(close);
        }
        markers
    }

    /// What opens and closes a thought.
    pub fn thought(&self) -> Option<(&'static str, &'static str)> {
        self.thought
    }

    /// A parser of one turn. `calls`: look for them; `tools` types the arguments where the style does not.
    pub fn parser(&'static self, tools: &[Tool], calls: bool, thinking: Thinking) -> Parser {
        Parser::new(self, tools, calls, thinking)
    }

    /// What the system message says about `tools` (an OpenAI-shaped list) where the template does not.
    pub fn instructions(&self, tools: &Value) -> String {
        let mut text = String::from("You can call these tools:\n");
        for tool in tools.as_array().into_iter().flatten() {
            let inner = tool.get("function").unwrap_or(tool);
            text.push_str(&inner.to_string());
            text.push('\n');
        }
        text.push_str(
            "\nTo call one, answer with its name and a JSON object of its arguments, written so:\n",
        );
        text.push_str(&self.call("NAME", "{...}"));
        text.push_str("\nWrite one such block per call. Answer in plain text where no tool helps.");
        text
    }

    /// A turn of one call, with `arguments` a JSON object; as hermes writes it where this style writes no JSON.
    pub fn call(&self, name: &str, arguments: &str) -> String {
        let style = match self.arguments {
            Arguments::Json | Arguments::Envelope => self,
            Arguments::Tagged(_) | Arguments::Python | Arguments::Gemma => &HERMES,
        };
        let head = [style.open, style.before, name, style.after].concat();
        let head = head.replace(NUMBER, "0");
        [&head, arguments, style.end, style.close].concat()
    }

    /// Whether the calls of a turn are the items of a list.
    pub(super) fn is_list(&self) -> bool {
        self.open.trim_end().ends_with('[')
    }
}

/// Every string of a configuration, a line each, up to a megabyte of them.
fn gather_text(value: &Value, depth: usize, text: &mut String) {
    const DEEPEST: usize = 32;
    if depth > DEEPEST || text.len() > 1 << 20 {
        return;
    }
    match value {
        Value::String(piece) => {
            text.push_str(piece);
            text.push('\n');
        }
        Value::Array(items) => items.iter().for_each(|v| gather_text(v, depth + 1, text)),
        Value::Object(fields) => fields
            .values()
            .for_each(|v| gather_text(v, depth + 1, text)),
        _ => {}
    }
}

fn sign_in(text: &str) -> Option<&'static Style> {
    let (_, name) = SIGNS
        .iter()
        .find(|(signs, _)| signs.iter().all(|sign| text.contains(sign)))?;
    Style::known(name)
}
