//! Messages and tools -> prompt, as transformers' apply_chat_template renders them. No tokens here.
//!
//! minijinja's parser reads the template; what runs it is ours (`template/lower.rs`, `template/run.rs`). Its own virtual
//! machine is no place to teach Python's semantics: operators, iteration over None, comparison and
//! `~` on built-in values have no hook, and text or nesting that a hostile template makes has no bound.

mod checks;
mod clock;
mod eval;
mod filters;
mod format;
mod globals;
mod input;
mod lower;
mod methods;
mod names;
mod ops;
mod origin;
mod program;
mod run;
mod teach;
mod text;
mod value;

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};
use program::Program;
use run::Run;
use value::{Budget, Fault, Res, Value};

pub use clock::Now;
pub use input::{Conversation, Input, Inputs};
pub use value::BIG_INT_KEY;

/// Marks the end of the message to be continued; cut off again after rendering.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// One chat template, compiled once and rendered often, from any thread.
///
/// ```
/// use hfcore_engine::template::{ChatTemplate, RenderRequest};
/// let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
/// let template = ChatTemplate::new("default", source, &Default::default())?;
/// let messages = serde_json::json!([{"role": "user", "content": "Hi"}]);
/// let prompt = template.render(&RenderRequest { messages, ..Default::default() })?;
/// assert_eq!(prompt, "<user>Hi");
/// # Ok::<(), hfcore_engine::error::Error>(())
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    name: String,
    source: String,
    /// The tokens that the program asks for, by name id.
    special_tokens: Vec<(u32, Value)>,
    program: Program,
}

/// What one render is given. All but `messages` may stay at its default.
///
/// An integer that JSON cannot hold (beyond 64 bits) is written as `{BIG_INT_KEY: "digits"}`.
#[derive(Debug, Default, Clone)]
pub struct RenderRequest {
    /// An array of OpenAI-shaped objects, at least one.
    pub messages: Json,
    /// Tool schemas; None is Python's None in the template.
    pub tools: Option<Json>,
    /// Documents for retrieval templates, likewise.
    pub documents: Option<Json>,
    pub add_generation_prompt: bool,
    /// End the prompt inside the last message, so that the model goes on with it.
    pub continue_final_message: bool,
    /// The field of it to go on with; None is `content`.
    pub continue_field: Option<String>,
    /// What strftime_now reads; None is the local clock.
    pub now: Option<Now>,
    /// Keep message keys whose value is null, as render_jinja_template does; apply_chat_template drops them.
    pub keep_none_keys: bool,
    /// Further variables; they win over special tokens.
    pub variables: Map<String, Json>,
}

/// A part of a prompt, by its bytes, and whether the template itself wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub text: Range<usize>,
    pub template: bool,
}

/// What a render gives.
#[derive(Debug, Default)]
pub struct Rendered {
    pub text: String,
    /// Where the `{% generation %}` blocks lie, in code points.
    pub spans: Vec<Range<usize>>,
    /// The parts of the text, where they were wanted.
    pub segments: Vec<Segment>,
}

impl ChatTemplate {
    /// Compile `source`. `name` appears in errors; `special_tokens` (`bos_token`, ...) are variables.
    ///
    /// # Errors
    /// [`Error::Template`] with the line, if the source is no template.
    pub fn new(
        name: &str,
        source: &str,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<ChatTemplate> {
        let program = lower::compile(name, source).map_err(|fault| template_error(name, *fault))?;
        let asked_for = |(name, token): (&String, &String)| {
            Some((program.id(name)?, Value::from(token.as_str())))
        };
        Ok(ChatTemplate {
            name: name.to_owned(),
            source: source.to_owned(),
            special_tokens: special_tokens.iter().filter_map(asked_for).collect(),
            program,
        })
    }

    /// The prompt.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for messages that are no conversation, and where
    /// `continue_final_message` cannot be done; [`Error::Template`] where the template fails or
    /// refuses (`thrown`), with its line.
    pub fn render(&self, request: &RenderRequest) -> Result<String> {
        self.render_with_spans(request).map(|(text, _)| text)
    }

    /// The prompt, and where its `{% generation %}` blocks lie, in code points.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_with_spans(
        &self,
        request: &RenderRequest,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let rendered = self.render_conversation(request.conversation()?, false)?;
        Ok((rendered.text, rendered.spans))
    }

    /// The prompt in parts: what the template itself wrote, and what came out of messages, tools,
    /// documents and variables. The parts follow one another and make up the whole prompt.
    ///
    /// Special tokens given to [`new`](Self::new) are the template's. Text made of data in a way that
    /// cannot be followed character by character counts as data.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_segments(&self, request: &RenderRequest) -> Result<(String, Vec<Segment>)> {
        let rendered = self.render_conversation(request.conversation()?, true)?;
        Ok((rendered.text, rendered.segments))
    }

    /// Render what was put together value by value. Segments are followed only where wanted: it costs
    /// some time.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_conversation(&self, mut given: Conversation, segments: bool) -> Result<Rendered> {
        let mut messages = given.prepared()?;
        let continued = match given.continue_final_message {
            true => Some(self.mark_final_message(&given, &mut messages)?),
            false => None,
        };
        let (text, spans) = self
            .run(given, messages, segments)
            .map(|rendered| (rendered.text, rendered.spans))
            .map_err(|fault| template_error(&self.name, *fault))?;
        let (mut text, parts) = text.into_segments();
        if let Some(content) = continued {
            let kept = cut_at_tag(&text, &content)?.len();
            text.truncate(kept);
        }
        let segments = match segments {
            true => parts
                .into_iter()
                .filter(|(range, _)| range.start < text.len())
                .map(|(range, template)| Segment {
                    text: range.start..range.end.min(text.len()),
                    template,
                })
                .collect(),
            false => Vec::new(),
        };
        Ok(Rendered {
            text,
            spans,
            segments,
        })
    }

    /// The template text as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Does the template read `tools`?
    pub fn takes_tools(&self) -> bool {
        self.program.mentions("tools")
    }

    fn run(&self, given: Conversation, messages: Vec<Value>, segments: bool) -> Res<run::Rendered> {
        let mut budget = Budget::for_input(given.bytes);
        if segments {
            budget.follow_data();
        }
        let data = |value: Value| match segments {
            true => input::as_data(&value),
            false => value,
        };
        let mut run = Run::new(&self.program, budget, given.now);
        for (id, token) in &self.special_tokens {
            run.define_id(*id, token.clone());
        }
        for (name, value) in given.variables {
            run.define(&name, |_| Ok(data(value.0)))?;
        }
        run.define("messages", |budget| {
            Ok(data(Value::list(messages, budget)?))
        })?;
        let optional = |value: Option<Input>| value.map_or(Value::None, |value| data(value.0));
        run.define("tools", |_| Ok(optional(given.tools)))?;
        run.define("documents", |_| Ok(optional(given.documents)))?;
        run.define("add_generation_prompt", |_| {
            Ok(Value::Bool(given.add_generation_prompt))
        })?;
        run.finish()
    }

    /// Put the tag behind the last message's text; returns the text as it was.
    fn mark_final_message(&self, given: &Conversation, messages: &mut [Value]) -> Result<String> {
        let invalid = |message: String| Err(Error::InvalidRequest(message));
        if given.add_generation_prompt {
            return invalid(
                "continue_final_message and add_generation_prompt cannot both be set: the first ends the prompt \
                 inside the last message, the second opens a new one"
                    .into(),
            );
        }
        let wanted = given.continue_field.as_deref().unwrap_or("content");
        let last = messages.last_mut();
        let found = last.as_ref().and_then(|last| input::field(last, wanted));
        let (Some(last), Some(found)) = (last, found.filter(|found| !matches!(found, Value::None)))
        else {
            return invalid(format!(
                "continue_final_message wants a last message with {wanted}, got one without"
            ));
        };
        // Reasoning goes by several names: the template may read any of them.
        let mut fields = vec![wanted];
        if input::REASONING.contains(&wanted) {
            let same = |field: &&str| {
                let other = input::field(last, field);
                let mut budget = Budget::for_input(given.bytes);
                other.is_some_and(|other| other.equals(&found, &mut budget).unwrap_or(false))
            };
            fields = input::REASONING.into_iter().filter(same).collect();
        }
        if !fields.iter().any(|field| self.source.contains(field)) {
            return invalid(format!(
                "continue_final_message: template {:?} does not read {wanted}",
                self.name
            ));
        }
        let Some((original, tagged)) = input::continued(&found, CONTINUE_TAG) else {
            return invalid(
                "continue_final_message wants text in the last message, got none".into(),
            );
        };
        // Of a list the named field alone is continued, as transformers does.
        let several = matches!(found, Value::Str(_));
        for field in fields {
            if several || field == wanted {
                *last = input::with_field(last, field, tagged.clone());
            }
        }
        Ok(original)
    }
}

/// The prompt up to the tag; white space before it goes where the template trimmed the tag's own.
fn cut_at_tag<'t>(rendered: &'t str, content: &str) -> Result<&'t str> {
    let is_space = |c: char| text::is_space(c);
    let found = rendered.rfind(CONTINUE_TAG.trim_end());
    match found {
        Some(at) if rendered.contains(content.trim_matches(is_space)) => {
            let cut = &rendered[..at];
            Ok(match rendered[at..].starts_with(CONTINUE_TAG) {
                true => cut,
                false => cut.trim_end_matches(is_space),
            })
        }
        _ => Err(Error::InvalidRequest(
            "continue_final_message is set, but the last message is not in the rendered chat: the template \
             changes or drops it"
                .into(),
        )),
    }
}

fn template_error(name: &str, fault: Fault) -> Error {
    Error::Template {
        name: name.to_owned(),
        line: fault.line.map_or(1, |line| line as usize),
        message: fault.message,
        thrown: fault.thrown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> Result<ChatTemplate> {
        let special = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        ChatTemplate::new("test", source, &special)
    }

    fn request(messages: Json) -> RenderRequest {
        let now = Now {
            year: 2026,
            month: 3,
            day: 4,
            hour: 5,
            minute: 6,
            second: 7,
        };
        RenderRequest {
            messages,
            now: Some(now),
            ..Default::default()
        }
    }

    fn render(source: &str) -> Result<String> {
        template(source)?.render(&request(json!([{"role": "user", "content": "hi"}])))
    }

    fn text(source: &str) -> String {
        render(source).unwrap_or_else(|error| panic!("{source}: {error}"))
    }

    fn error(source: &str) -> String {
        match render(source) {
            Ok(text) => panic!("{source} must fail, rendered {} bytes", text.len()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_template_crosses_threads() {
        fn check<T: Send + Sync>() {}
        check::<ChatTemplate>();
    }

    #[test]
    fn tools_documents_and_special_tokens_are_always_defined() {
        assert_eq!(
            text("{{ tools }}{{ documents is none }}{{ add_generation_prompt }}{{ bos_token }}"),
            "NoneTrueFalse<s>"
        );
        assert!(template("{% if tools %}{% endif %}").unwrap().takes_tools());
        assert!(!template("{{ messages }}").unwrap().takes_tools());
    }

    #[test]
    fn blocks_are_trimmed_and_line_ends_normalised() {
        assert_eq!(
            text("a\r\n  {% if true %}\r\nb\r\n{% endif %}\r\nc\n"),
            "a\nb\nc"
        );
        assert_eq!(text("{% raw %}\n{{ x }}{% endraw %}"), "\n{{ x }}");
    }

    #[test]
    fn values_print_as_python_prints_them() {
        assert_eq!(
            text("{{ [1.0, 1e16, 1e-7, true, none, 'it\\'s', '\\u200b'] }}"),
            r#"[1.0, 1e+16, 1e-07, True, None, "it's", '\u200b']"#
        );
        assert_eq!(
            text("{{ {'a': (1,)} }}{{ range(3) }}"),
            "{'a': (1,)}range(0, 3)"
        );
    }

    #[test]
    fn tojson_is_json_dumps_without_ascii_or_html_escapes() {
        assert_eq!(
            text("{{ {'b': '<é>', 'a': [1, 2.0]} | tojson }}"),
            r#"{"b": "<é>", "a": [1, 2.0]}"#
        );
        assert_eq!(
            text("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}"),
            "{\n \"a\": 2,\n \"b\": 1\n}"
        );
    }

    #[test]
    fn integers_of_any_size_come_through() {
        let digits = "123456789012345678901234567890123456789012345678901234567890";
        let messages = json!([{"role": "user", "content": {"n": {BIG_INT_KEY: digits}}}]);
        let template =
            template("{{ messages[0].content | tojson }}{{ -messages[0].content.n }}").unwrap();
        assert_eq!(
            template.render(&request(messages)).unwrap(),
            format!("{{\"n\": {digits}}}-{digits}")
        );
    }

    #[test]
    fn none_is_not_iterable_and_types_do_not_mix() {
        assert!(
            error("{% for x in none %}{% endfor %}").contains("'NoneType' object is not iterable")
        );
        assert!(error("{{ 'a' + 1 }}").contains("unsupported operand"));
        assert!(
            error("{{ 1 < 'a' }}").contains("not supported between instances of 'int' and 'str'")
        );
        assert!(error("{{ missing.field }}").contains("'missing' is undefined"));
    }

    #[test]
    fn the_sandbox_refuses_changes_and_underscores() {
        assert!(error("{{ messages.append(1) }}").contains("unsafe"));
        assert!(error("{{ ''.__class__.__mro__ }}").contains("unsafe"));
        assert!(error("{{ namespace(_x=1) }}").contains("unsafe"));
    }

    #[test]
    fn errors_carry_name_line_and_whether_the_template_threw() {
        let thrown = render("a\n\n{{ raise_exception('no ' ~ 'way') }}").unwrap_err();
        assert!(
            matches!(&thrown, Error::Template { name, line: 3, message, thrown: true } if name == "test" && message == "no way"),
            "{thrown}"
        );
        let syntax = template("a\n{% if %}").unwrap_err();
        assert!(
            matches!(
                &syntax,
                Error::Template {
                    line: 2,
                    thrown: false,
                    ..
                }
            ),
            "{syntax}"
        );
        let unknown =
            render("{% if false %}{{ 1 | bogus }}{% endif %}\n{{ 1 | bogus }}").unwrap_err();
        assert!(
            matches!(
                &unknown,
                Error::Template {
                    line: 2,
                    thrown: false,
                    ..
                }
            ),
            "{unknown}"
        );
    }

    #[test]
    fn scopes_are_jinja2s() {
        assert_eq!(
            text(
                "{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}"
            ),
            "231"
        );
        assert_eq!(
            text(
                "{% set n = namespace(x=1) %}{% for i in [1, 2] %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}"
            ),
            "4"
        );
        assert_eq!(
            text(
                "{% macro m(a, b=a) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ m(1) }}{{ m(1, 2, 3) }}"
            ),
            "11()12(3,)"
        );
    }

    #[test]
    fn generation_spans_count_code_points() {
        let source = "é{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}";
        let messages =
            json!([{"role": "assistant", "content": "äö"}, {"role": "assistant", "content": "x"}]);
        let (text, spans) = template(source)
            .unwrap()
            .render_with_spans(&request(messages))
            .unwrap();
        assert_eq!((text.as_str(), spans), ("éäö;x;", vec![1..3, 4..5]));
        assert!(
            error("{% for i in [1] %}{% generation %}{% break %}{% endgeneration %}{% endfor %}")
                .contains("not properly in loop")
        );
    }

    #[test]
    fn null_keys_are_dropped_and_reasoning_has_both_names() {
        let messages = json!([{"role": "assistant", "tool_calls": null, "reasoning": "r"}]);
        let template = template("{{ messages[0] }}").unwrap();
        let wanted =
            "{'thinking': 'r', 'role': 'assistant', 'reasoning': 'r', 'reasoning_content': 'r'}";
        assert_eq!(template.render(&request(messages.clone())).unwrap(), wanted);
        let raw = RenderRequest {
            keep_none_keys: true,
            ..request(messages)
        };
        assert!(
            template
                .render(&raw)
                .unwrap()
                .contains("'tool_calls': None")
        );
    }

    #[test]
    fn a_continued_message_ends_the_prompt() {
        let continued = |source: &str, content: &str| {
            let messages = json!([{"role": "assistant", "content": content}]);
            template(source)?.render(&RenderRequest {
                continue_final_message: true,
                ..request(messages)
            })
        };
        assert_eq!(
            continued("<{{ messages[0].content }}></s>", "so ").unwrap(),
            "<so "
        );
        assert_eq!(
            continued("<{{ messages[0].content | trim }}></s>", "so ").unwrap(),
            "<so"
        );
        assert!(matches!(
            continued("<{{ messages[0].content | length }}>", "so"),
            Err(Error::InvalidRequest(_))
        ));
        let both = RenderRequest {
            add_generation_prompt: true,
            continue_final_message: true,
            ..request(json!([{"role": "user", "content": "a"}]))
        };
        assert!(matches!(
            template("{{ messages[0].content }}").unwrap().render(&both),
            Err(Error::InvalidRequest(_))
        ));
        let none = RenderRequest {
            continue_final_message: true,
            ..request(json!([{"role": "user"}]))
        };
        assert!(matches!(
            template("{{ messages[0].content }}").unwrap().render(&none),
            Err(Error::InvalidRequest(_))
        ));
    }

    #[test]
    fn what_is_no_conversation_is_refused_with_what_came() {
        let refused = |messages: Json| {
            template("x")
                .unwrap()
                .render(&request(messages))
                .unwrap_err()
                .to_string()
        };
        assert!(refused(json!("hi")).contains("got a string"));
        assert!(refused(json!([])).contains("got none"));
        assert!(refused(json!([1])).contains("message 0 must be an object, got a number"));
    }

    #[test]
    fn another_field_than_the_content_can_be_continued() {
        let source = "{{ messages[0].reasoning_content }}|{{ messages[0].content }}";
        let continued = |field: &str, messages: Json| {
            template(source).unwrap().render(&RenderRequest {
                continue_final_message: true,
                continue_field: Some(field.to_owned()),
                ..request(messages)
            })
        };
        let thoughts = json!([{"role": "assistant", "thinking": "so ", "content": "x"}]);
        assert_eq!(continued("thinking", thoughts.clone()).unwrap(), "so ");
        assert_eq!(
            continued("reasoning_content", thoughts.clone()).unwrap(),
            "so "
        );
        assert!(continued("reasoning", thoughts.clone()).is_err());
        assert!(continued("words", thoughts).is_err());
    }

    #[test]
    fn the_clock_is_the_one_given() {
        assert_eq!(
            text("{{ strftime_now('%d %b %Y %H:%M:%S %j %A %V %-d %Z|') }}"),
            "04 Mar 2026 05:06:07 063 Wednesday 10 4 |"
        );
    }

    #[test]
    fn hostile_templates_end_with_an_error() {
        let endless =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(error(endless).contains("used up"));
        let doubling = "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}";
        assert!(error(doubling).contains("bytes are used up"));
        let lists = "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}";
        assert!(error(lists).contains("used up"));
        let shared = "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}";
        assert!(error(shared).contains("used up"));
        let deep = "{% set n = namespace(x=[1]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}";
        assert!(error(deep).contains("nest deeper"));
        assert!(
            error("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").contains("recursion depth")
        );
        assert!(error("{% macro m(x) %}{% if true %}{{ [[(x, m(x) ~ 'a') | first]] }}{% endif %}{% endmacro %}{{ m(1) }}").contains("recursion depth"));
        assert!(error("{{ 'x' * 99999999999 }}").contains("used up"));
        assert!(error("{{ '%999999999d' % 1 }}").contains("used up"));
        assert!(error("{{ '%9999999999d' % 1 }}").contains("above"));
        assert!(error("{{ 'a'.center(999999999999) }}").contains("used up"));
        assert!(error("{{ 2 ** 99999 }}").contains("4300 digits"));
        let maps = "{% set n = namespace(x=[1]) %}{% for i in range(9999) %}{% set n.x = n.x | map('string') %}{% endfor %}";
        assert!(error(maps).contains("nest deeper"));
    }

    #[test]
    fn the_deepest_nesting_allowed_fits_into_a_small_stack() {
        let nested = format!("{}m(x){}", "(not ".repeat(60), ")".repeat(60));
        let source = format!("{{% macro m(x) %}}{{{{ {nested} }}}}{{% endmacro %}}{{{{ m(1) }}}}");
        let run = move || error(&source);
        let thread = std::thread::Builder::new().stack_size(1 << 20).spawn(run);
        let message = thread.unwrap().join().unwrap();
        assert!(message.contains("recursion depth"), "{message}");
    }

    #[test]
    fn hostile_sources_do_not_compile() {
        for source in [
            format!("{{{{ {}1 }}}}", "-".repeat(9999)),
            format!("{{{{ {}1 }}}}", "not ".repeat(9999)),
            format!("{{{{ {}1{} }}}}", "(".repeat(9999), ")".repeat(9999)),
            format!("{{{{ x{} }}}}", ".y".repeat(1900)),
            format!("{{{{ x{} }}}}", "|e".repeat(99999)),
            "{% if x %}".repeat(9999),
            format!("{{% if x %}}{}{{% endif %}}", "{% elif x %}".repeat(9999)),
            "x".repeat(2 << 20),
        ] {
            assert!(
                matches!(
                    template(&source),
                    Err(Error::Template { thrown: false, .. })
                ),
                "{}",
                &source[..40]
            );
        }
    }
}
