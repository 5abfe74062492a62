//! Every style's grammar and parser against the same samples, and every template's style.

use llguidance::toktrie::ApproximateTokEnv;
use llguidance::{Matcher, ParserFactory, api::TopLevelGrammar};
use serde_json::{Value, json};

use super::*;

struct Plain;

impl Lark for Plain {
    fn literal(&self, text: &str) -> String {
        json!(text).to_string()
    }
    fn schema(&self, schema: &Value) -> Result<String> {
        Ok(format!("%json {schema}"))
    }
}

fn tools() -> Vec<Tool> {
    tools_of(&json!([
        {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"},
                "unit": {"enum": ["C", "F"]}, "tags": {"type": "array", "items": {"type": "string"}}},
            "required": ["city"], "additionalProperties": false}}},
        {"name": "now"}
    ]))
    .unwrap()
}

/// Style, text of one call, text of two calls: get_weather(city "Köln </b>", days 2, unit C), now().
fn samples() -> Vec<(&'static str, String, Option<String>)> {
    let args = r#"{"city": "Köln </b>", "days": 2, "unit": "C"}"#;
    let object = |key: &str| format!(r#"{{"name": "get_weather", "{key}": {args}}}"#);
    let now = r#"{"name": "now", "arguments": {}}"#;
    let list = |open: &str, close: &str| {
        let one = format!("{open}[{}]{close}", object("arguments"));
        let two = format!("{open}[{}, {now}]{close}", object("arguments"));
        (one, Some(two))
    };
    let fence = |name: &str, args: &str| {
        format!(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{args}\n```<｜tool▁call▁end｜>"
        )
    };
    let bare = |name: &str, args: &str| {
        format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{args}<｜tool▁call▁end｜>")
    };
    let section = |calls: &str| format!("<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>");
    let hermes = format!("<tool_call>\n{}\n</tool_call>", object("arguments"));
    let granite_fc = format!("<function_call> {}", object("arguments"));
    let coder = "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln </b>\n</parameter>\n\
                 <parameter=days>\n2\n</parameter>\n<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>";
    let glm = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln </b></arg_value>\n\
               <arg_key>days</arg_key>\n<arg_value>2</arg_value>\n\
               <arg_key>unit</arg_key>\n<arg_value>C</arg_value>\n</tool_call>";
    let tight = glm.replace('\n', "");
    let gemma = "<|tool_call>call:get_weather{city:<|\"|>Köln </b><|\"|>,days:2,unit:<|\"|>C<|\"|>}<tool_call|>";
    let python = r#"get_weather(city="Köln </b>", days=2, unit="C")"#;
    let listed = [
        ("mistral", list("[TOOL_CALLS]", "")),
        ("phi4", list("<|tool_call|>", "<|/tool_call|>")),
        ("functools", list("functools", "")),
        ("granite", list("<|tool_call|>", "")),
        ("apriel", list("<tool_calls>", "</tool_calls>")),
    ];
    let mut samples = vec![
        (
            "hermes",
            hermes.clone(),
            Some(format!("{hermes}\n<tool_call>\n{now}\n</tool_call>")),
        ),
        ("llama3_json", object("parameters"), None),
        (
            "llama3_json",
            format!("<|python_tag|>{}", object("parameters")),
            None,
        ),
        (
            "pythonic",
            format!("[{python}]"),
            Some(format!("[{python}, now()]")),
        ),
        (
            "lfm2",
            format!("<|tool_call_start|>[{python}]<|tool_call_end|>"),
            Some(format!(
                "<|tool_call_start|>[{python}, now()]<|tool_call_end|>"
            )),
        ),
        (
            "mistral_named",
            format!("[TOOL_CALLS]get_weather[ARGS]{args}"),
            Some(format!(
                "[TOOL_CALLS]get_weather[ARGS]{args}[TOOL_CALLS]now[ARGS]{{}}"
            )),
        ),
        (
            "qwen3_coder",
            coder.into(),
            Some(format!(
                "{coder}\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
            )),
        ),
        (
            "deepseek",
            section(&fence("get_weather", args)),
            Some(section(&format!(
                "{}\n{}",
                fence("get_weather", args),
                fence("now", "{}")
            ))),
        ),
        (
            "deepseek_v31",
            section(&bare("get_weather", args)),
            Some(section(&format!(
                "{}{}",
                bare("get_weather", args),
                bare("now", "{}")
            ))),
        ),
        (
            "granite_fc",
            granite_fc.clone(),
            Some(format!("{granite_fc}<function_call> {now}")),
        ),
        (
            "glm",
            glm.into(),
            Some(format!("{glm}\n<tool_call>now\n</tool_call>")),
        ),
        (
            "glm_tight",
            tight.clone(),
            Some(format!("{tight}<tool_call>now</tool_call>")),
        ),
        (
            "gemma",
            gemma.into(),
            Some(format!("{gemma}<|tool_call>call:now{{}}<tool_call|>")),
        ),
        (
            "harmony",
            format!(
                "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{args}<|call|>"
            ),
            None,
        ),
    ];
    samples.extend(xml_samples());
    let kimi = |name: &str, at: usize, args: &str| {
        format!(
            "<|tool_call_begin|>functions.{name}:{at}<|tool_call_argument_begin|>{args}<|tool_call_end|>"
        )
    };
    let section =
        |calls: &str| format!("<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>");
    let one = kimi("get_weather", 10, args);
    samples.push((
        "kimi",
        section(&one),
        Some(section(&format!("{one}{}", kimi("now", 11, "{}")))),
    ));
    let item = |name: &str, at: usize, args: &str| {
        format!(r#"{{"tool_call_id": "{at}", "tool_name": "{name}", "parameters": {args}}}"#)
    };
    let list = |items: &str| format!("<|START_ACTION|>[\n    {items}\n]<|END_ACTION|>");
    let one = item("get_weather", 0, args);
    samples.push((
        "cohere",
        list(&one),
        Some(list(&format!("{one},\n    {}", item("now", 1, "{}")))),
    ));
    let one = format!("<function=get_weather>{args}</function>");
    samples.push((
        "functionary",
        one.clone(),
        Some(format!("{one}<function=now>{{}}</function>")),
    ));
    samples.extend(listed.map(|(name, (one, two))| (name, one, two)));
    samples
}

/// Calls whose arguments stand between tags.
fn xml_samples() -> Vec<(&'static str, String, Option<String>)> {
    let seed = "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Köln </b></parameter>\n\
                <parameter=days>2</parameter>\n<parameter=unit>C</parameter>\n</function>\n</seed:tool_call>";
    let minimax = "<invoke name=\"get_weather\">\n<parameter name=\"city\">Köln </b></parameter>\n\
                   <parameter name=\"days\">2</parameter>\n<parameter name=\"unit\">C</parameter>\n</invoke>\n";
    let dsml = "<｜DSML｜invoke name=\"get_weather\">\n\
                <｜DSML｜parameter name=\"city\" string=\"true\">Köln </b></｜DSML｜parameter>\n\
                <｜DSML｜parameter name=\"days\" string=\"false\">2</｜DSML｜parameter>\n\
                <｜DSML｜parameter name=\"unit\" string=\"true\">C</｜DSML｜parameter>\n</｜DSML｜invoke>\n";
    let section = |mark: &str, calls: &str| format!("<{mark}>\n{calls}</{mark}>");
    let two = |mark: &str, one: &str, now: &str| {
        (
            section(mark, one),
            Some(section(mark, &format!("{one}{now}"))),
        )
    };
    let (one_m, two_m) = two(
        "minimax:tool_call",
        minimax,
        "<invoke name=\"now\">\n</invoke>\n",
    );
    let now = "<｜DSML｜invoke name=\"now\">\n</｜DSML｜invoke>\n";
    let (one_d, two_d) = two("｜DSML｜function_calls", dsml, now);
    let now = "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>";
    vec![
        ("seed", seed.into(), Some(format!("{seed}\n{now}"))),
        ("minimax", one_m, two_m),
        ("deepseek_v32", one_d, two_d),
    ]
}

fn accepts(grammar: &str, text: &str) -> bool {
    let env = ApproximateTokEnv::single_byte_env();
    let factory = ParserFactory::new_simple(&env).unwrap();
    let parser = factory.create_parser(TopLevelGrammar::from_lark(grammar.to_string()));
    let parser = parser.unwrap_or_else(|error| panic!("{error}\n{grammar}"));
    let mut matcher = Matcher::new(Ok(parser));
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    let taken = matcher.try_consume_tokens(&tokens).unwrap();
    taken == tokens.len() && matcher.is_accepting().unwrap()
}

/// Pushes `pieces` and sums up: text, reasoning, and each call's name and arguments.
fn total<'a>(
    mut parser: Parser,
    pieces: impl IntoIterator<Item = &'a str>,
) -> (String, String, Vec<(String, String)>) {
    let mut parts: Vec<Parsed> = pieces.into_iter().map(|piece| parser.push(piece)).collect();
    parts.push(parser.finish());
    let (mut text, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for part in parts {
        text.push_str(&part.text);
        reasoning.push_str(&part.reasoning);
        for call in part.calls {
            if let Some(name) = call.name {
                assert_eq!(call.index, calls.len());
                assert!(call.id.is_some());
                calls.push((name, String::new()));
            }
            assert_eq!(call.index + 1, calls.len());
            calls.last_mut().unwrap().1.push_str(&call.arguments);
        }
    }
    assert_eq!(parser.called(), !calls.is_empty());
    (text, reasoning, calls)
}

/// The total of `text`, the same however it is cut.
fn read(style: &str, thinking: Thinking, text: &str) -> (String, String, Vec<(String, String)>) {
    let style = Style::named(style).unwrap();
    let parser = || style.parser(&tools(), true, thinking);
    let whole = total(parser(), [text]);
    let letters: Vec<&str> = text.split_inclusive(|_: char| true).collect();
    assert_eq!(total(parser(), letters.iter().copied()), whole, "{text}");
    for (at, _) in text.char_indices() {
        let (a, b) = text.split_at(at);
        assert_eq!(total(parser(), [a, b]), whole, "{a:?} {b:?}");
    }
    let mut seed = 1u64;
    for _ in 0..50 {
        let (mut pieces, mut rest) = (Vec::new(), text);
        while !rest.is_empty() {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (piece, tail) = rest.split_at(parser::floor(rest, 1 + (seed >> 33) as usize % 12));
            let (piece, tail) = if piece.is_empty() {
                (rest, "")
            } else {
                (piece, tail)
            };
            pieces.push(piece);
            rest = tail;
        }
        assert_eq!(total(parser(), pieces.iter().copied()), whole, "{pieces:?}");
    }
    whole
}

fn weather() -> Value {
    json!({"city": "Köln </b>", "days": 2, "unit": "C"})
}

fn check_weather(calls: &[(String, String)], context: &str) {
    assert!(!calls.is_empty(), "{context}");
    assert_eq!(calls[0].0, "get_weather", "{context}");
    let arguments: Value = serde_json::from_str(&calls[0].1).expect(context);
    assert_eq!(arguments, weather(), "{context}");
}

#[test]
fn what_a_grammar_lets_through_its_parser_reads() {
    let tools = tools();
    let all: Vec<&Tool> = tools.iter().collect();
    for (name, one, two) in samples() {
        let style = Style::named(name).unwrap();
        for several in [false, true] {
            let grammar = style.calls_grammar(&all, several, &Plain).unwrap();
            assert!(accepts(&grammar, &one), "{name}: {one}\n{grammar}");
            assert!(!accepts(&grammar, &one[..one.len() / 2]), "{name}");
            assert!(
                !accepts(&grammar, &one.replace("get_weather", "got_weather")),
                "{name}"
            );
            if let Some(two) = &two {
                assert_eq!(accepts(&grammar, two), several, "{name}: {two}\n{grammar}");
            }
        }
        let (text, _, calls) = read(name, Thinking::Possible, &one);
        assert_eq!((text.as_str(), calls.len()), ("", 1), "{name}: {calls:?}");
        check_weather(&calls, name);
        let Some(two) = two else { continue };
        let (text, _, calls) = read(name, Thinking::Possible, &format!("{two}\n"));
        assert_eq!((text.as_str(), calls.len()), ("", 2), "{name}: {calls:?}");
        check_weather(&calls, name);
        assert_eq!(calls[1], ("now".into(), "{}".into()), "{name}");
    }
}

#[test]
fn a_trigger_and_its_grammar_make_a_turn_that_is_read_amid_text() {
    let tools = tools();
    let all: Vec<&Tool> = tools.iter().collect();
    for (name, one, two) in samples() {
        let style = Style::named(name).unwrap();
        for text in [Some(one), two].into_iter().flatten() {
            let triggers = style.trigger(&all, true, &Plain).unwrap();
            let fits = triggers.iter().any(|(marker, grammar)| {
                text.strip_prefix(marker.as_str())
                    .is_some_and(|rest| accepts(grammar, rest))
            });
            assert!(fits, "{name}: {text}\n{triggers:?}");
            if style.bare && name == "llama3_json" && !text.starts_with("<|") {
                continue;
            }
            let amid = format!("I will look: [x] <b> {{}} {text}");
            let (said, _, calls) = read(name, Thinking::Off, &amid);
            let said = said.trim_start_matches("<|channel|>");
            assert!(
                said.starts_with("I will look: [x] <b> {}"),
                "{name}: {said}"
            );
            check_weather(&calls, name);
        }
    }
}

#[test]
fn every_kind_of_argument_is_written_and_typed() {
    let schema = json!({"type": "object", "required": ["o", "m"], "$defs": {"S": {"type": "string"}}, "properties": {
        "o": {"type": "object", "properties": {"k": {"type": "string"}, "l": {"type": "array", "items": {"type": "number"}}}},
        "m": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "r": {"$ref": "#/$defs/S"}, "b": {"type": "boolean"}, "any": {}}});
    let tools = vec![Tool {
        name: "f".into(),
        parameters: schema,
    }];
    let all: Vec<&Tool> = tools.iter().collect();
    let samples = [
        (
            "gemma",
            "<|tool_call>call:f{o:{k:<|\"|>a}<|\"|>,l:[1,2.5]},m:null,b:true,any:[{a.b:<|\"|>,<|\"|>}]}<tool_call|>",
        ),
        (
            "glm_tight",
            "<tool_call>f<arg_key>o</arg_key><arg_value>{\"k\": \"a}\", \"l\": [1, 2.5]}</arg_value>\
          <arg_key>m</arg_key><arg_value>null</arg_value><arg_key>b</arg_key><arg_value>true</arg_value>\
          <arg_key>any</arg_key><arg_value>[{\"a.b\": \",\"}]</arg_value></tool_call>",
        ),
        (
            "pythonic",
            "[f(o={\"k\": \"a}\", \"l\": [1, 2.5]}, m=null, b=true, any=[{\"a.b\": \",\"}])]",
        ),
    ];
    for (name, text) in samples {
        let style = Style::named(name).unwrap();
        let grammar = style.calls_grammar(&all, true, &Plain).unwrap();
        assert!(accepts(&grammar, text), "{name}\n{grammar}");
        let (rest, _, calls) = total(
            style.parser(&tools, true, Thinking::Off),
            text.split_inclusive(|_: char| true),
        );
        assert_eq!(rest, "", "{name}");
        let arguments: Value = serde_json::from_str(&calls[0].1).unwrap();
        assert_eq!(
            arguments,
            json!({"o": {"k": "a}", "l": [1, 2.5]}, "m": null, "b": true, "any": [{"a.b": ","}]}),
            "{name}"
        );
    }
}

#[test]
fn python_s_own_literals_are_read_and_a_bare_word_is_a_string() {
    let (text, _, calls) = read(
        "pythonic",
        Thinking::Off,
        "[f(a=True, b=None, c='x\\'\"y', d=(1, 2), e=Köln am Rhein)]",
    );
    assert_eq!(text, "");
    let arguments: Value = serde_json::from_str(&calls[0].1).unwrap();
    assert_eq!(
        arguments,
        json!({"a": true, "b": null, "c": "x'\"y", "d": [1, 2], "e": "Köln am Rhein"})
    );
}

#[test]
fn what_only_looks_like_a_call_comes_out_as_text() {
    for (style, text) in [
        ("hermes", "<tool_call> is a tag"),
        ("hermes", "<tool_call>\n{\"name\": 3}\n</tool_call>"),
        ("hermes", "<tool_call>\n{\"name\": \"x\""),
        ("hermes", "a < b <tool <tool_cal"),
        ("llama3_json", "{\"answer\": 42}"),
        ("llama3_json", "{\"name\": \"Bob\", \"age\": 3}"),
        ("llama3_json", " \n{\"name\": \"Bob\"}"),
        ("pythonic", "[1, 2] and [link](http)"),
        ("mistral", "[TOOL_CALLS] none"),
        ("mistral_named", "[TOOL_CALLS]a b[ARGS]{}"),
        ("qwen3_coder", "<tool_call>\n<func x>"),
        ("glm", "<tool_call>"),
        ("gemma", "<|tool_call>call you"),
        ("deepseek", "<｜tool▁calls▁begin｜>none"),
        ("phi4", "<|tool_call|>{}"),
        (
            "kimi",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:<|",
        ),
        ("minimax", "an <invoke name=\"x\"> tag"),
        ("cohere", "<|START_ACTION|>[1]"),
        ("functionary", "<function=a b>{}"),
    ] {
        assert_eq!(
            read(style, Thinking::Possible, text),
            (text.into(), String::new(), vec![]),
            "{style}"
        );
    }
}

#[test]
fn a_loose_writer_is_understood() {
    for (style, text, wanted) in [
        (
            "hermes",
            "<tool_call>{\"arguments\":{\"a\":1},\"name\":\"x\"}</tool_call>",
            "{\"a\":1}",
        ),
        (
            "hermes",
            "<tool_call>{\"name\":\"x\",\"arguments\":\"{\\\"a\\\": 1}\"}</tool_call>",
            "{\"a\": 1}",
        ),
        ("hermes", "<tool_call>{\"name\":\"x\"}</tool_call>", "{}"),
        (
            "hermes",
            "<tool_call>{\"name\":\"x\", \"arguments\": {\"a\": tru",
            "{\"a\": tru",
        ),
        (
            "mistral",
            "[TOOL_CALLS] [{\"name\": \"x\", \"arguments\": {\"a\": 1}, \"id\": \"123456789\"}]",
            "{\"a\": 1}",
        ),
        (
            "harmony",
            " to=functions.x<|channel|>commentary json<|message|>{\"a\": 1}<|call|>",
            "{\"a\": 1}",
        ),
        (
            "harmony",
            "<|start|>assistant to=functions.x<|channel|>commentary json<|message|>{\"a\": 1}",
            "{\"a\": 1}",
        ),
        (
            "qwen3_coder",
            "<tool_call><function=x><parameter=a>1</parameter></function></tool_call>",
            "{\"a\": 1}",
        ),
        (
            "glm",
            "<tool_call>x\n<arg_key>a</arg_key><arg_value>True</arg_value></tool_call>",
            "{\"a\": true}",
        ),
    ] {
        let (text, _, calls) = read(style, Thinking::Possible, text);
        assert_eq!(text, "", "{style}");
        assert_eq!(
            calls,
            vec![("x".to_string(), wanted.to_string())],
            "{style}"
        );
    }
}

#[test]
fn a_thought_is_told_from_the_answer() {
    let both = |text: &str, thought: &str| (text.to_string(), thought.to_string(), vec![]);
    for (style, thinking, text, wanted) in [
        (
            "hermes",
            Thinking::Possible,
            "<think>\na\n\nb\n</think>\n\nc\n",
            both("c\n", "a\n\nb"),
        ),
        (
            "hermes",
            Thinking::Possible,
            "\n<think></think>\n\n\nc",
            both("\nc", ""),
        ),
        (
            "hermes",
            Thinking::Begun,
            "a < b</thinking\n</think>c",
            both("c", "a < b</thinking"),
        ),
        ("hermes", Thinking::Begun, "a </thi", both("", "a </thi")),
        (
            "hermes",
            Thinking::Off,
            "<think>a</think>b",
            both("<think>a</think>b", ""),
        ),
        (
            "hermes",
            Thinking::Possible,
            "b <think>a</think>",
            both("b <think>a</think>", ""),
        ),
        (
            "gemma",
            Thinking::Possible,
            "<|channel>thought\nhm\n<channel|>yes",
            both("yes", "hm"),
        ),
        (
            "mistral_named",
            Thinking::Possible,
            "[THINK]hm[/THINK]yes",
            both("yes", "hm"),
        ),
        (
            "harmony",
            Thinking::Possible,
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>",
            both("yes", "hm"),
        ),
    ] {
        assert_eq!(read(style, thinking, text), wanted, "{style}: {text}");
    }
    let text = "<think>\nhm\n</think>\n\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let (said, thought, calls) = read("hermes", Thinking::Possible, text);
    assert_eq!(
        (said.as_str(), thought.as_str(), calls.len()),
        ("", "hm", 1)
    );
}

#[test]
fn harmony_may_think_before_a_call() {
    let tools = tools();
    let style = Style::named("harmony").unwrap();
    let grammar = style.calls_grammar(&[&tools[1]], true, &Plain).unwrap();
    let text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.now \
                <|constrain|>json<|message|>{}";
    assert!(accepts(&grammar, text), "{grammar}");
    let (said, thought, calls) = read("harmony", Thinking::Possible, text);
    assert_eq!((said.as_str(), thought.as_str()), ("", "hm"));
    assert_eq!(calls, vec![("now".into(), "{}".into())]);
}

#[test]
fn without_calls_text_passes_untouched() {
    let text = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let parser = Style::named("hermes")
        .unwrap()
        .parser(&tools(), false, Thinking::Off);
    assert_eq!(total(parser, [text]).0, text);
}

#[test]
fn an_id_is_new_each_time_and_mistral_s_has_nine_letters() {
    let mut seen = std::collections::HashSet::new();
    for (name, length) in [("mistral", 9), ("hermes", 23)] {
        for _ in 0..50 {
            let (_, one, _) = samples()
                .into_iter()
                .find(|(style, _, _)| *style == name)
                .unwrap();
            let id = Style::named(name)
                .unwrap()
                .parser(&[], true, Thinking::Off)
                .push(&one)
                .calls[0]
                .id
                .clone();
            let id = id.unwrap();
            assert_eq!(id.len(), length);
            assert!(
                id.trim_start_matches("call_")
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric())
            );
            assert!(seen.insert(id));
        }
    }
}

#[test]
fn a_wrong_list_of_tools_is_refused_with_what_came() {
    for (list, wanted) in [
        (json!({}), "tools: a list is wanted, an object came"),
        (json!([{"function": {}}]), "tools[0]: a tool needs a name"),
        (
            json!([{"name": ""}]),
            "tools[0]: a name has 1 to 256 bytes, this one 0",
        ),
        (
            json!([{"name": "x"}, {"name": "x"}]),
            "tools: two are named \"x\"",
        ),
        (
            json!([{"name": "x y"}]),
            "tools[0]: a name has letters, digits, '_', '.' and '-', \"x y\" has ' '",
        ),
        (
            json!([{"name": "x", "parameters": 3}]),
            "tools: the parameters of \"x\" must be an object, a number came",
        ),
    ] {
        assert_eq!(tools_of(&list).unwrap_err().to_string(), wanted);
    }
}

#[test]
fn a_choice_has_many_spellings_and_names_a_tool_that_is_there() {
    let tools = tools();
    let named = ToolChoice::Named("now".into());
    for (value, wanted) in [
        (json!("none"), ToolChoice::None),
        (json!(false), ToolChoice::None),
        (json!("auto"), ToolChoice::Auto),
        (json!({"type": "auto"}), ToolChoice::Auto),
        (json!("any"), ToolChoice::Required),
        (json!(true), ToolChoice::Required),
        (json!({"type": "any"}), ToolChoice::Required),
        (json!("now"), named.clone()),
        (json!({"type": "tool", "name": "now"}), named.clone()),
        (
            json!({"type": "function", "function": {"name": "now"}}),
            named,
        ),
    ] {
        assert_eq!(
            ToolChoice::parse(&value, &tools).unwrap(),
            wanted,
            "{value}"
        );
    }
    let error = ToolChoice::parse(&json!("get_wether"), &tools)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("[\"get_weather\", \"now\"]; did you mean \"get_weather\"?"),
        "{error}"
    );
    assert!(ToolChoice::parse(&json!("required"), &[]).is_err());
    assert!(ToolChoice::parse(&json!(3), &tools).is_err());
}

#[test]
fn a_required_argument_that_no_property_describes_is_refused_by_name() {
    let tool = Tool {
        name: "f".into(),
        parameters: json!({"type": "object", "required": ["q"]}),
    };
    let error = Style::named("glm")
        .unwrap()
        .calls_grammar(&[&tool], true, &Plain)
        .unwrap_err();
    assert!(
        error.to_string().contains("\"f\" requires \"q\""),
        "{error}"
    );
}

#[test]
fn a_name_nobody_knows_is_answered_with_all_of_them() {
    let error = Style::named("herms").unwrap_err().to_string();
    for style in STYLES {
        assert!(error.contains(style.name()), "{error}");
    }
}

#[test]
fn a_response_template_shows_its_style() {
    let fields = |tool_calls: Value| json!({"version": 1, "fields": {"content": {"close": "<|im_end|>"}, "tool_calls": tool_calls}});
    for (value, wanted) in [
        (
            fields(json!({"open": "<tool_call>", "close": "</tool_call>", "content": "json"})),
            "hermes",
        ),
        (
            fields(json!({"open": ["[TOOL_CALLS]"], "content": "json"})),
            "mistral",
        ),
        (
            fields(
                json!({"open_pattern": r"<\|tool_call_begin\|>(?P<name>.*?)<\|tool_calls_section_begin\|>"}),
            ),
            "kimi",
        ),
        (
            fields(json!({"open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>\s*"})),
            "qwen3_coder",
        ),
        (
            json!({"properties": {"tool_calls": {"x-regex-iterator": "<tool_call>\\s*(.*?)</tool_call>"}}}),
            "hermes",
        ),
        (
            json!({"x-regex": "<\\|channel\\|>final<\\|message\\|>(.*)"}),
            "harmony",
        ),
    ] {
        assert_eq!(
            Style::of_response_template(&value).map(Style::name),
            Some(wanted),
            "{value}"
        );
    }
}

#[test]
fn a_response_template_of_unknown_shape_shows_nothing() {
    let mut deep = json!("<tool_call>");
    for _ in 0..1000 {
        deep = json!([deep]);
    }
    let call = json!({"tool_calls": {"open": "<tool_call>"}});
    for value in [
        json!(null),
        json!("<tool_call>"),
        json!(["<tool_call>"]),
        json!({}),
        json!({"a": "<tool_call>"}),
        json!({"version": 2, "fields": call}),
        json!({"version": "1", "fields": call}),
        json!({"fields": "<tool_call>"}),
        json!({"fields": {}}),
        json!({"fields": {"content": {"close": "<|im_end|>"}}}),
        json!({"fields": {"tool_calls": deep}}),
    ] {
        assert!(Style::of_response_template(&value).is_none(), "{value:.80}");
    }
}

#[test]
fn what_a_response_template_leaves_open_its_chat_template_shows() {
    let named = |name| Style::named(name).unwrap();
    assert_eq!(named("glm_tight").spelled_as(named("glm")).name(), "glm");
    for (from, shown) in [
        ("hermes", "qwen3_coder"),
        ("glm", "hermes"),
        ("kimi", "deepseek"),
    ] {
        assert_eq!(named(from).spelled_as(named(shown)).name(), from);
    }
}

#[test]
fn a_string_without_quotes_keeps_its_bounds() {
    let schema = json!({"type": "object", "required": ["s"], "$defs": {"E": {"enum": ["a/b", "c"]}}, "properties": {"s": null}});
    let accepted = |style: &str, of_s: Value, text: &str| {
        let mut parameters = schema.clone();
        parameters["properties"]["s"] = of_s;
        let tool = Tool {
            name: "f".into(),
            parameters,
        };
        let style = Style::named(style).unwrap();
        let grammar = style.calls_grammar(&[&tool], false, &Plain).unwrap();
        let text = match style.name() {
            "qwen3_coder" => format!(
                "<tool_call>\n<function=f>\n<parameter=s>\n{text}\n</parameter>\n</function>\n</tool_call>"
            ),
            "seed" => format!(
                "<seed:tool_call>\n<function=f>\n<parameter=s>{text}</parameter>\n</function>\n</seed:tool_call>"
            ),
            "glm_tight" => {
                format!("<tool_call>f<arg_key>s</arg_key><arg_value>{text}</arg_value></tool_call>")
            }
            _ => format!("<|tool_call>call:f{{s:<|\"|>{text}<|\"|>}}<tool_call|>"),
        };
        accepts(&grammar, &text)
    };
    let string = |mut bounds: Value| {
        bounds["type"] = "string".into();
        bounds
    };
    for style in ["qwen3_coder", "seed", "glm_tight", "gemma"] {
        for (schema, good, bad) in [
            (
                string(json!({"maxLength": 3})),
                &["", "äöü", "a\nb"][..],
                &["abcd", "äöüß"][..],
            ),
            (
                string(json!({"minLength": 2})),
                &["ab", "</par>"],
                &["", "ä"],
            ),
            (
                string(json!({"pattern": "^[0-9]{2}/x$"})),
                &["12/x"],
                &["1/x", "12/xy", "a12/x"],
            ),
            (
                string(json!({"pattern": "[0-9]"})),
                &["a1b", "1"],
                &["ab", ""],
            ),
            (
                string(json!({"pattern": "^a", "minLength": 2, "maxLength": 3})),
                &["ab", "abc"],
                &["a", "abcd", "bab"],
            ),
            (
                string(json!({"enum": ["abc", "d"], "maxLength": 2})),
                &["d"],
                &["abc"],
            ),
            (string(json!({"const": "x"})), &["x"], &["y", ""]),
            (json!({"$ref": "#/$defs/E"}), &["a/b", "c"], &["d"]),
            (
                json!({"allOf": [{"$ref": "#/$defs/E"}], "default": "c"}),
                &["a/b"],
                &["d"],
            ),
            (
                json!({"anyOf": [string(json!({"maxLength": 1})), string(json!({"pattern": "^xy+$"}))]}),
                &["a", "xyy"],
                &["ab"],
            ),
        ] {
            for text in good {
                assert!(
                    accepted(style, schema.clone(), text),
                    "{style} {schema} {text:?}"
                );
            }
            for text in bad {
                assert!(
                    !accepted(style, schema.clone(), text),
                    "{style} {schema} {text:?}"
                );
            }
        }
        let short_or_null = json!({"anyOf": [string(json!({"maxLength": 2})), {"type": "null"}]});
        assert!(accepted(style, short_or_null.clone(), "ab"), "{style}");
        assert!(!accepted(style, short_or_null.clone(), "abc"), "{style}");
        if style != "gemma" {
            assert!(accepted(style, short_or_null.clone(), "null"), "{style}");
        }
    }
}

#[test]
fn bounds_that_cannot_be_kept_without_quotes_are_refused_with_the_reason() {
    for (schema, wanted) in [
        (
            json!({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]}),
            "the bounds of \"s\"",
        ),
        (json!({"maxLength": 2}), "the bounds of \"s\""),
        (
            json!({"type": "string", "not": {"const": "x"}}),
            "\"not\" of a string",
        ),
        (
            json!({"type": "string", "pattern": "(?=a)"}),
            "looks around",
        ),
        (
            json!({"type": "string", "minLength": 3, "maxLength": 2}),
            "no text has minLength 3 and maxLength 2",
        ),
        (
            json!({"type": "string", "maxLength": -1}),
            "a whole number up to 1048576, -1 came",
        ),
        (json!({"enum": ["a</parameter>"]}), "cannot be written"),
    ] {
        let tool = Tool {
            name: "f".into(),
            parameters: json!({"type": "object", "properties": {"s": schema}}),
        };
        let style = Style::named("qwen3_coder").unwrap();
        let error = style
            .calls_grammar(&[&tool], false, &Plain)
            .unwrap_err()
            .to_string();
        assert!(error.contains(wanted), "{schema}: {error}");
    }
}

#[test]
fn tags_that_tell_strings_from_json_type_what_a_schema_leaves_open() {
    let tools = vec![Tool {
        name: "f".into(),
        parameters: json!({"type": "object", "properties": {
            "a": {"type": ["string", "integer"], "maxLength": 2}, "b": {"type": ["string", "integer"]}, "c": {}}}),
    }];
    let text = |a: &str| {
        format!(
            "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f\">\n\
             <｜DSML｜parameter name=\"a\" string=\"true\">{a}</｜DSML｜parameter>\n\
             <｜DSML｜parameter name=\"b\" string=\"false\">5</｜DSML｜parameter>\n\
             <｜DSML｜parameter name=\"c\" string=\"false\">[1, \"x\"]</｜DSML｜parameter>\n\
             </｜DSML｜invoke>\n</｜DSML｜function_calls>"
        )
    };
    let style = Style::named("deepseek_v32").unwrap();
    let grammar = style.calls_grammar(&[&tools[0]], false, &Plain).unwrap();
    assert!(accepts(&grammar, &text("12")), "{grammar}");
    assert!(!accepts(&grammar, &text("123")), "{grammar}");
    let text = text("12");
    for pieces in [
        vec![text.as_str()],
        text.split_inclusive(|_: char| true).collect(),
    ] {
        let (_, _, calls) = total(style.parser(&tools, true, Thinking::Off), pieces);
        let arguments: Value = serde_json::from_str(&calls[0].1).unwrap();
        assert_eq!(arguments, json!({"a": "12", "b": 5, "c": [1, "x"]}));
    }
}

#[test]
fn a_frame_around_the_answer_is_dropped_and_a_thought_before_it_told_apart() {
    let text =
        "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>a <b> <|START<|END_RESPONSE|>";
    let wanted = ("a <b> <|START".into(), "hm".into(), vec![]);
    assert_eq!(read("cohere", Thinking::Possible, text), wanted);
    let parser = Style::named("cohere")
        .unwrap()
        .parser(&[], false, Thinking::Possible);
    assert_eq!(total(parser, [text]), wanted);
}

/// A vocabulary where marks of two letters are special tokens.
struct Special;

impl Lark for Special {
    fn literal(&self, text: &str) -> String {
        match text.starts_with("<|tool_call")
            && text.ends_with("|>")
            && text.matches('<').count() == 1
        {
            true => "<[300]>".into(),
            false => json!(text).to_string(),
        }
    }
    fn schema(&self, schema: &Value) -> Result<String> {
        Ok(format!("%json {schema}"))
    }
}

#[test]
fn a_special_token_amid_a_marker_is_written_as_one() {
    let tools = tools();
    let style = Style::named("kimi").unwrap();
    let grammar = style.calls_grammar(&[&tools[1]], false, &Special).unwrap();
    let wanted = "start: <[300]> <[300]> \"functions.\" call <[300]>\n";
    assert!(grammar.starts_with(wanted), "{grammar}");
    assert!(
        grammar.contains("call: \"now:\" /[0-9]{1,4}/ <[300]> rest0"),
        "{grammar}"
    );
}

#[test]
fn the_instructions_show_each_tool_and_how_to_call() {
    let text = STYLES[0].instructions(&json!([{"type": "function", "function": {"name": "now"}}]));
    assert!(text.contains("{\"name\":\"now\"}"), "{text}");
    assert!(
        text.contains("<tool_call>\n{\"name\": \"NAME\", \"arguments\": {...}}\n</tool_call>"),
        "{text}"
    );
}

#[test]
fn a_template_shows_its_style() {
    let Some(cases) = std::env::var_os("HFCORE_CASES") else {
        println!("skipped: HFCORE_CASES is not set");
        return;
    };
    let folder = std::path::Path::new(&cases).join("text/templates");
    let wanted = [
        ("automap__qwen2.5-0.5b", "hermes"),
        ("automap__qwen3-next-80b", "hermes"),
        ("hfjs__HuggingFaceTB-SmolLM3-3B", "hermes"),
        ("vllm__tool_chat_template_qwen3coder", "qwen3_coder"),
        (
            "llamacpp__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            "qwen3_coder",
        ),
        ("trl__qwen3_6", "qwen3_coder"),
        ("llamacpp__meta-llama-Llama-3.1-8B-Instruct", "llama3_json"),
        ("llamacpp__meta-llama-Llama-3.2-3B-Instruct", "llama3_json"),
        ("llamacpp__mistralai-Mistral-Nemo-Instruct-2407", "mistral"),
        ("vllm__tool_chat_template_mistral3", "mistral"),
        (
            "llamacpp__unsloth-mistral-Devstral-Small-2507",
            "mistral_named",
        ),
        ("automap__deepseek-v3-671b", "deepseek"),
        ("llamacpp__llama-cpp-deepseek-r1", "deepseek"),
        ("vllm__tool_chat_template_deepseekv31", "deepseek_v31"),
        ("vllm__tool_chat_template_glm4", "glm"),
        ("llamacpp__GLM-4.6-2", "glm"),
        ("llamacpp__GLM-5.2", "glm_tight"),
        ("vllm__tool_chat_template_phi4_mini", "functools"),
        ("automap__granite3.3-2b", "granite"),
        ("vllm__tool_chat_template_granite_20b_fc", "granite_fc"),
        ("vllm__tool_chat_template_gemma4", "gemma"),
        ("llamacpp__openai-gpt-oss-120b", "harmony"),
        ("vllm__tool_chat_template_toolace", "pythonic"),
        ("trl__lfm2", "lfm2"),
        ("llamacpp__unsloth-Apriel-1.5", "apriel"),
        ("llamacpp__Kimi-K2-Instruct", "kimi"),
        ("llamacpp__Kimi-K2-Thinking", "kimi"),
        ("llamacpp__moonshotai-Kimi-K2", "kimi"),
        ("llamacpp__deepseek-ai-DeepSeek-V3.2", "deepseek_v32"),
        ("llamacpp__MiniMax-M2", "minimax"),
        ("llamacpp__ByteDance-Seed-OSS", "seed"),
        (
            "llamacpp__CohereForAI-c4ai-command-r7b-12-2024-tool_use",
            "cohere",
        ),
        ("hfjs__CohereLabs-c4ai-command-a-03-2025", "cohere"),
        ("hfjs__CohereLabs-command-a-reasoning-08-2025", "cohere"),
        ("llamacpp__meetkai-functionary-medium-v3.1", "functionary"),
        // Calls of their own that are not known here.
        ("llamacpp__Kimi-K3", "hermes"),
        ("llamacpp__GigaChat3-10B-A1.8B", "hermes"),
        (
            "llamacpp__CohereForAI-c4ai-command-r-plus-tool_use",
            "hermes",
        ),
        // No tools at all.
        ("trl__gemma3_training", "hermes"),
        ("automap__llama2-7b", "hermes"),
    ];
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "jinja") {
            let source = std::fs::read_to_string(&path).unwrap();
            let style = Style::of_template(&source, source.contains("tools"));
            println!(
                "{:60} {}",
                path.file_stem().unwrap().display(),
                style.name()
            );
        }
    }
    for (name, style) in wanted {
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        assert_eq!(
            Style::of_template(&source, source.contains("tools")).name(),
            style,
            "{name}"
        );
    }
}
