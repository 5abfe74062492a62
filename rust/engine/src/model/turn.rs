//! A turn of a conversation for a model that runs elsewhere: its prompt, and what the text of its answer turns out to be. Runs
//! nothing, and binds no answer to a grammar.

use serde_json::{Value, json};

use super::answer::Answer;
use super::{Prompt, chat_text, refuse, render_plain, split_options};
use crate::error::{Error, Result};
use crate::options::{Defaults, Options};
use crate::response::{Parsed, Parser, Style, Thinking};
use crate::stop::StopBuffer;
use crate::template::{ChatTemplate, RenderRequest};

/// One answer that is being read. See [`Turn::new`].
pub struct Turn {
    prompt: String,
    options: Options,
    markers: Vec<&'static str>,
    stop: StopBuffer,
    parser: Option<Parser>,
    stopped: bool,
}

impl Turn {
    /// The prompt of a text or of messages, which go through `template`. `options` are those of [`super::Model::submit`], but
    /// for what needs a grammar: here nobody makes a model follow one.
    ///
    /// # Errors
    /// As `submit`; `InvalidRequest` for such options, and for ids in place of a text.
    pub fn new(
        prompt: Prompt,
        template: Option<&ChatTemplate>,
        options: Value,
        defaults: &Defaults,
    ) -> Result<Self> {
        let (mut for_template, mut options) = split_options(options)?;
        let answer = Answer::take(&mut options)?;
        answer.refuse_bound()?;
        let options = Options::parse(&Value::Object(options), defaults)?;
        refuse("priority", options.priority != 0, "hfcore's own engine")?;
        refuse(
            "prompt_logprobs",
            options.prompt_logprobs,
            "hfcore's own engine",
        )?;
        refuse("adapter", options.adapter.is_some(), "hfcore's own engine")?;
        let source = template.map(|template| (template.source(), template.takes_tools()));
        let (source, takes_tools) = source.unwrap_or_default();
        let style = answer.style(Style::of_template(source, takes_tools));
        let (prompt, thinking) = match prompt {
            Prompt::Messages(messages) => {
                let special = options.add_special_tokens.is_some();
                refuse("add_special_tokens", special, "text prompts")?;
                if for_template.parse_special_in_content == Some(false) {
                    return Err(Error::InvalidRequest(
                        "parse_special_in_content is false, but this tokenizer reads special tokens wherever they stand"
                            .into(),
                    ));
                }
                let template = template.ok_or_else(|| Error::NoChatTemplate {
                    model: "the tokenizer".into(),
                })?;
                if answer.tools.is_empty() {
                    for_template.tools = None;
                }
                let render = |request: &RenderRequest| render_plain(template, request);
                let (text, _, thinking) =
                    chat_text(template, for_template, messages, &answer, style, &render)?;
                (text, thinking)
            }
            Prompt::Text(text) => {
                for_template.refuse_any()?;
                refuse("tools", !answer.tools.is_empty(), "messages")?;
                refuse("reasoning", answer.reasoning.is_some(), "messages")?;
                (text, Thinking::Off)
            }
            Prompt::Ids(_) => {
                let problem = "a prompt must be a text or messages here, got token ids";
                return Err(Error::InvalidRequest(problem.into()));
            }
        };
        let parser = answer.parser(style, thinking);
        Ok(Self {
            prompt,
            stop: StopBuffer::new(&options.stop),
            options,
            markers: match parser {
                Some(_) => style.markers(),
                None => Vec::new(),
            },
            parser,
            stopped: false,
        })
    }

    /// What is to be continued.
    pub fn prompt(&self) -> &str {
        &self.prompt
    }

    /// Special tokens that must stand in the text that is pushed.
    pub fn markers(&self) -> &[&'static str] {
        &self.markers
    }

    /// The request's options and the defaults as one, checked: what the sampler must know, as a JSON object.
    pub fn options(&self) -> Value {
        let o = &self.options;
        json!({
            "max_tokens": o.max_tokens,
            "min_tokens": o.min_tokens,
            "do_sample": o.do_sample,
            "temperature": o.temperature,
            "top_k": o.top_k,
            "top_p": o.top_p,
            "min_p": o.min_p,
            "typical_p": o.typical_p,
            "repetition_penalty": o.repetition_penalty,
            "frequency_penalty": o.frequency_penalty,
            "presence_penalty": o.presence_penalty,
            "logit_bias": o.logit_bias.iter().map(|(id, bias)| json!([id, bias])).collect::<Vec<_>>(),
            "seed": o.seed,
            "stop_token_ids": o.stop_token_ids,
            "ignore_eos": o.ignore_eos,
            "n": o.n,
            "logprobs": o.logprobs,
            "top_logprobs": o.top_logprobs,
            "skip_special_tokens": o.skip_special_tokens,
            "add_special_tokens": o.add_special_tokens,
            "timeout": o.timeout.map(|time| time.as_secs_f64()),
        })
    }

    /// Take the text of the next token, which a stop string ends only if it `may_stop`.
    pub fn push(&mut self, text: &str, may_stop: bool) -> Parsed {
        if self.stopped {
            return Parsed::default();
        }
        if !may_stop {
            return self.read(text);
        }
        let released = self.stop.push(text);
        self.stopped = released.hit.is_some();
        let mut out = self.read(&released.text);
        if self.stopped {
            append(&mut out, self.end());
        }
        out
    }

    /// No more text comes: what was held back.
    pub fn finish(&mut self) -> Parsed {
        if self.stopped {
            return Parsed::default();
        }
        self.stopped = true;
        let held = self.stop.finish();
        let mut out = self.read(&held);
        append(&mut out, self.end());
        out
    }

    /// Whether a stop string came, or the end.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Whether any call began so far.
    pub fn called(&self) -> bool {
        self.parser.as_ref().is_some_and(Parser::called)
    }

    /// Whether a thought is under way; none where thoughts are not told from the rest.
    pub fn in_thought(&self) -> Option<bool> {
        let parser = self.parser.as_ref().filter(|p| p.splits_thoughts());
        parser.map(Parser::in_thought)
    }

    fn read(&mut self, text: &str) -> Parsed {
        match &mut self.parser {
            Some(parser) => parser.push(text),
            None => Parsed {
                text: text.to_string(),
                ..Parsed::default()
            },
        }
    }

    fn end(&mut self) -> Parsed {
        self.parser.as_mut().map(Parser::finish).unwrap_or_default()
    }
}

fn append(out: &mut Parsed, more: Parsed) {
    out.text += &more.text;
    out.reasoning += &more.reasoning;
    out.calls.extend(more.calls);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(prompt: Prompt, template: Option<&str>, options: Value) -> Result<Turn> {
        let special = std::collections::BTreeMap::new();
        let template = template.map(|source| ChatTemplate::new("t", source, &special).unwrap());
        Turn::new(prompt, template.as_ref(), options, &Defaults::default())
    }

    fn messages() -> Prompt {
        Prompt::Messages(json!([{"role": "user", "content": "hi"}]))
    }

    const PLAIN: &str =
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>";

    #[test]
    fn a_stop_string_ends_the_text_wherever_it_is_cut() {
        let options = json!({"stop": ["END"], "max_tokens": 5});
        let mut turn = turn(Prompt::Text("a".into()), None, options).unwrap();
        assert_eq!(turn.push("END", false).text, "END");
        assert_eq!(turn.push("one E", true).text, "one ");
        assert_eq!(turn.push("ND two", true).text, "");
        assert!(turn.stopped());
        assert_eq!(turn.push("more", true), Parsed::default());
        assert_eq!(turn.finish(), Parsed::default());
    }

    #[test]
    fn what_is_held_back_comes_out_at_the_end() {
        let mut turn = turn(Prompt::Text("a".into()), None, json!({"stop": "END"})).unwrap();
        assert_eq!(turn.push("x EN", true).text, "x ");
        assert_eq!(turn.finish().text, "EN");
    }

    #[test]
    fn calls_are_read_as_the_template_writes_them() {
        let tool = json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}});
        let options = json!({"tools": [tool]});
        let mut turn = turn(messages(), Some(PLAIN), options).unwrap();
        // The template lists no tools: the system message tells of them.
        assert!(turn.prompt().contains("add") && turn.prompt().ends_with("<assistant>"));
        let text = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>";
        let mut out = turn.push(text, true);
        append(&mut out, turn.finish());
        assert!(turn.called());
        assert_eq!(out.calls[0].name.as_deref(), Some("add"));
        let arguments: String = out.calls.iter().map(|c| c.arguments.as_str()).collect();
        assert_eq!(arguments, "{\"a\": 1}");
    }

    #[test]
    fn what_needs_a_grammar_is_refused() {
        let tool = json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}});
        let bound = [
            json!({"regex": "a+"}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"tools": [tool], "tool_choice": "required"}),
            json!({"tools": [tool], "tool_choice": "add"}),
            json!({"tools": [tool], "parallel_tool_calls": false}),
        ];
        for options in bound {
            let error = turn(messages(), Some(PLAIN), options).err().unwrap();
            assert!(error.to_string().contains("grammar"), "{error}");
        }
        let free =
            json!({"tools": [tool], "tool_choice": "none", "response_format": {"type": "text"}});
        assert!(turn(messages(), Some(PLAIN), free).is_ok());
    }
}
