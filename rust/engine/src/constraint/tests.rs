use serde_json::json;

use super::*;

/// All bytes, a few longer tokens, and an end token.
fn tokenizer() -> Arc<Tokenizer> {
    let visible = |byte: u8| -> char {
        // The byte-level alphabet of GPT-2.
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                let before = (0..byte)
                    .filter(|b| !matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF))
                    .count();
                char::from_u32(256 + before as u32).unwrap()
            }
        }
    };
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocab.insert(visible(byte).to_string(), json!(byte));
    }
    for (i, word) in [
        "na",
        "nam",
        "name",
        "\":",
        "\":\u{120}",
        "\"}",
        "{\"",
        "00",
        "0000",
        ",\u{120}",
    ]
    .iter()
    .enumerate()
    {
        vocab.insert((*word).into(), json!(256 + i));
    }
    let merges = [
        "n a",
        "na m",
        "nam e",
        "\" :",
        "\": \u{120}",
        "\" }",
        "{ \"",
        "0 0",
        "00 00",
        ", \u{120}",
    ];
    let end = 256 + merges.len();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            {"id": end, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": end + 1, "content": "<call>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges}
    });
    Arc::new(Tokenizer::from_bytes("test", tokenizer.to_string().as_bytes()).unwrap())
}

pub const END: u32 = 266;
const CALL: u32 = 267;

pub fn grammars(forcing: bool) -> Arc<Grammars> {
    Arc::new(Grammars::new(tokenizer(), 268, &[END], forcing).unwrap())
}

/// A seeded stream of numbers (Steele et al., 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Write a text of random allowed tokens; its bytes, and how many tokens it took.
fn write(
    grammars: &Arc<Grammars>,
    rule: &Rule,
    budget: usize,
    random: &mut Random,
) -> (String, usize) {
    let mut constraint = Constraint::new(grammars.clone(), rule);
    let mut tokens = Vec::new();
    while tokens.len() < budget && !constraint.complete() {
        let left = budget - tokens.len() - 1;
        let allowed: Vec<u32> = match constraint.mask().unwrap() {
            Some(mask) => mask.iter().collect(),
            None => (0..266).collect(),
        };
        let mut taken = None;
        for _ in 0..8 {
            let token = allowed[random.below(allowed.len())];
            if constraint.take(token, left) {
                taken = Some(token);
                break;
            }
        }
        let token = taken.unwrap_or_else(|| constraint.close(left).unwrap());
        if token == END {
            break;
        }
        tokens.push(token);
        tokens.extend(constraint.forced(budget - tokens.len()));
    }
    let bytes = grammars.vocabulary.trie.decode(&tokens);
    (String::from_utf8_lossy(&bytes).into_owned(), tokens.len())
}

fn rule(grammars: &Grammars, source: Source) -> Rule {
    Rule::Grammar(grammars.compile(&source.lark().unwrap()).unwrap())
}

fn hard_schema() -> Value {
    json!({
        "type": "object",
        "$defs": {"node": {"type": "object", "properties": {
            "name": {"type": "string", "minLength": 3},
            "left": {"$ref": "#/$defs/node"},
            "more": {"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 0},
            "kind": {"enum": ["a", "bb", 3, null]}},
            "required": ["name", "kind"]}},
        "properties": {
            "tree": {"$ref": "#/$defs/node"},
            "größe": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 9},
            "any": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}, "minItems": 2}, {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}]},
            "free": {}
        },
        "required": ["tree", "größe", "any"]
    })
}

#[test]
fn a_text_ends_within_any_budget_that_holds_the_shortest() {
    for forcing in [true, false] {
        let grammars = grammars(forcing);
        let rule = rule(&grammars, Source::JsonSchema(hard_schema()));
        let least = rule.least_tokens();
        assert!(least > 10);
        let mut random = Random(7);
        for round in 0..60 {
            let budget = least + random.below(200) * (round % 3);
            let (text, tokens) = write(&grammars, &rule, budget, &mut random);
            assert!(tokens <= budget);
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text:?}, {budget}"));
            assert!(
                value["tree"]["name"].as_str().unwrap().chars().count() >= 3,
                "{text}"
            );
        }
    }
}

#[test]
fn every_kind_of_source_is_obeyed_to_its_end() {
    let grammars = grammars(true);
    let mut random = Random(1);
    for (source, check) in [
        (
            Source::JsonObject,
            (|text: &str| serde_json::from_str::<Value>(text).unwrap().is_object())
                as fn(&str) -> bool,
        ),
        (Source::Regex("[a-c]{3,}-\\d{2}".into()), |text| {
            text.len() >= 6 && text.as_bytes()[text.len() - 3] == b'-'
        }),
        (
            Source::Choice(vec!["yes".into(), "no, \"never\"".into()]),
            |text| ["yes", "no, \"never\""].contains(&text),
        ),
        (
            Source::Lark("start: \"a\" inner \"b\"\ninner: \"(\" inner \")\" | \"x\"".into()),
            |text| text.contains('x') && text.ends_with('b'),
        ),
    ] {
        let rule = rule(&grammars, source.clone());
        for extra in [0, 1, 40] {
            let (text, _) = write(&grammars, &rule, rule.least_tokens() + extra, &mut random);
            assert!(check(&text), "{source:?} gave {text:?}");
        }
    }
}

#[test]
fn what_is_forced_comes_at_once() {
    let grammars = grammars(true);
    let schema =
        json!({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]});
    let rule = rule(&grammars, Source::JsonSchema(schema));
    let mut constraint = Constraint::new(grammars.clone(), &rule);
    let forced = constraint.forced(100);
    assert!(
        grammars
            .vocabulary
            .trie
            .decode_str(&forced)
            .starts_with("{\"name"),
        "{forced:?}"
    );
    assert!(forced.len() <= 6 && constraint.forced(9).is_empty());
}

#[test]
fn a_marker_in_free_text_begins_a_grammar_and_fits_only_with_room() {
    let grammars = grammars(true);
    let call = Rule::Grammar(grammars.compile("start: \"xyz\"").unwrap());
    for (marker, tokens) in [
        (Marker::Token(CALL), vec![CALL]),
        (
            Marker::Text("ab".into()),
            vec![u32::from(b'a'), u32::from(b'b')],
        ),
    ] {
        let rule = Rule::Until {
            markers: vec![(marker, call.clone())],
            must: false,
        };
        let mut constraint = Constraint::new(grammars.clone(), &rule);
        assert!(constraint.take(u32::from(b'q'), 9) && constraint.free());
        let (last, first) = tokens.split_last().unwrap();
        assert!(first.iter().all(|t| constraint.take(*t, 9)));
        assert!(!constraint.take(*last, 2), "no room for three more");
        assert!(constraint.free() && constraint.take(*last, 3) && !constraint.free());
        assert_eq!(
            grammars.vocabulary.trie.decode_str(&constraint.forced(3)),
            "xyz"
        );
        assert!(constraint.complete());
    }
}

#[test]
fn a_thought_gives_way_to_what_must_follow_it() {
    let grammars = grammars(true);
    let answer = Rule::Grammar(grammars.compile("start: \"xyz\"").unwrap());
    let rule = Rule::Until {
        markers: vec![(Marker::Text("</t>".into()), answer)],
        must: true,
    };
    let mut random = Random(3);
    for budget in [7, 8, 30] {
        let (text, tokens) = write(&grammars, &rule, budget, &mut random);
        assert!(text.ends_with("</t>xyz") && tokens <= budget, "{text:?}");
    }
}

#[test]
fn numbers_stay_within_what_a_double_holds() {
    let grammars = grammars(true);
    let rule = rule(
        &grammars,
        Source::JsonSchema(json!({"type": "array", "items": {"type": "number"}, "minItems": 4})),
    );
    let mut random = Random(5);
    for _ in 0..20 {
        let (text, _) = write(&grammars, &rule, 300, &mut random);
        for number in serde_json::from_str::<Vec<f64>>(&text).unwrap() {
            assert!(number.is_finite());
        }
    }
}

#[test]
fn a_schema_that_cannot_be_enforced_is_refused_by_name() {
    let grammars = grammars(true);
    let message = |schema: Value| match (Source::JsonSchema(schema))
        .lark()
        .and_then(|lark| grammars.compile(&lark).map(|_| ()))
    {
        Ok(()) => String::new(),
        Err(error) => error.to_string(),
    };
    for (schema, wanted) in [
        (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
        (json!({"not": {"type": "string"}}), "not"),
        (
            json!({"type": "integer", "minimum": 3, "maximum": 2}),
            "minimum",
        ),
        (json!({"$ref": "#/$defs/absent"}), "absent"),
        (json!(3), "an object"),
        (
            json!({"type": "object", "minProperties": 4}),
            "minProperties",
        ),
        (
            json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}, "required": ["b"]}}}),
            "no text",
        ),
    ] {
        let message = message(schema.clone());
        assert!(message.contains(wanted), "{schema}: {message:?}");
    }
    let deep = (0..200).fold(
        json!({"type": "string"}),
        |inner, _| json!({"type": "array", "items": inner}),
    );
    assert!(message(deep).contains("nested"));
}

#[test]
fn a_costly_schema_meets_a_limit_in_little_time() {
    let grammars = grammars(true);
    let many: Vec<Value> = (0..40).map(|i| json!({"type": "string", "pattern": format!("^(a|b|ab)*{{{i},400}}(x.*){{1,200}}$")})).collect();
    let properties: serde_json::Map<String, Value> = (0..3000)
        .map(|i| {
            (
                format!("k{i}"),
                json!({"type": "string", "maxLength": 5000}),
            )
        })
        .collect();
    for schema in [
        json!({"allOf": many}),
        json!({"type": "object", "properties": properties}),
        json!({"type": "string", "pattern": "(((a{1,100}){1,100}){1,100}){1,100}"}),
    ] {
        let started = std::time::Instant::now();
        let made = (Source::JsonSchema(schema))
            .lark()
            .and_then(|lark| grammars.compile(&lark));
        println!(
            "{:?} after {:?}",
            made.map(|_| ()).map_err(|e| e.to_string()),
            started.elapsed()
        );
    }
}

#[test]
fn a_grammar_is_compiled_once() {
    let grammars = grammars(true);
    let first = grammars.compile("start: \"a\"").unwrap();
    assert!(Arc::ptr_eq(
        &first,
        &grammars.compile("start: \"a\"").unwrap()
    ));
}

#[test]
fn a_number_that_grew_too_long_ends_the_text() {
    let grammars = grammars(true);
    for schema in [
        json!({"type": "number", "minimum": -1.25}),
        json!({"type": "integer", "multipleOf": 7}),
    ] {
        let rule = rule(&grammars, Source::JsonSchema(schema));
        let mut random = Random(9);
        for _ in 0..40 {
            let (text, _) = write(&grammars, &rule, 60, &mut random);
            assert!(text.parse::<f64>().is_ok() && text.len() < 24, "{text}");
        }
    }
}

#[test]
fn a_grammar_that_costs_too_much_to_follow_is_an_error() {
    let grammars = grammars(true);
    let lark = "start: s\ns: s s s | s s | \"a\" | \"b\" | \"\"\n";
    let grammar = grammars.compile(lark).unwrap();
    let mut constraint = Constraint::new(grammars, &Rule::Grammar(grammar));
    let end = (0..2000).find_map(|n| {
        let token = u32::from(b'a');
        constraint.mask().err().or_else(|| {
            constraint.take(token, 2000 - n);
            None
        })
    });
    let message = end.unwrap().to_string();
    assert!(message.contains("the grammar"), "{message}");
}

#[test]
fn a_mask_made_beside_the_model_is_the_one_made_here() {
    let grammars = grammars(true);
    let lark = Source::Choice(vec!["name".into(), "nab".into()])
        .lark()
        .unwrap();
    let grammar = grammars.compile(&lark).unwrap();
    let rule = Rule::Grammar(grammar);
    let mut here = Constraint::new(grammars.clone(), &rule);
    let mut beside = Constraint::new(grammars, &rule);
    let mut aside = Aside::default();
    for byte in b"na" {
        beside.prepare(&mut aside);
        let masks = [&mut here, &mut beside].map(|c| c.mask().unwrap().unwrap());
        assert_eq!(masks[0].as_slice(), masks[1].as_slice());
        for constraint in [&mut here, &mut beside] {
            assert!(constraint.take(u32::from(*byte), 10));
        }
    }
    assert!(!beside.free() && !beside.complete());
}
