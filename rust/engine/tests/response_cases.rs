//! Which style of calls a checkpoint's files choose, on a tiny real checkpoint. Data from HFCORE_CASES; skipped
//! without it.

use std::fs;
use std::path::{Path, PathBuf};

use hfcore_engine::model::{Model, ModelOptions, Prompt};
use serde_json::{Value, json};

/// A copy of a checkpoint with `added` in its tokenizer's configuration, removed at the end.
struct Checkpoint(PathBuf);

impl Checkpoint {
    fn new(cases: &Path, name: &str, added: Value) -> Self {
        let folder = format!("hfcore-response-{}-{name}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        fs::create_dir_all(&folder).unwrap();
        for file in [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        ] {
            let bytes = fs::read(cases.join("families/qwen2").join(file)).unwrap();
            fs::write(folder.join(file), bytes).unwrap();
        }
        fs::write(folder.join("tokenizer_config.json"), added.to_string()).unwrap();
        Self(folder)
    }

    /// The text of a forced call, its special tokens shown.
    fn call(&self, options: &ModelOptions, style: Option<&str>) -> String {
        let model = Model::open(&self.0, options, &|_, _| true).unwrap();
        let messages = json!([{"role": "user", "content": "Hi"}]);
        let request = json!({"tools": [{"name": "now"}], "tool_choice": "now", "tool_style": style, "max_tokens": 200});
        let mut ids = Vec::new();
        let mut names = Vec::new();
        for delta in model.submit(Prompt::Messages(messages), request).unwrap() {
            let delta = delta.unwrap();
            ids.extend(delta.token_ids);
            names.extend(delta.tool_calls.into_iter().filter_map(|call| call.name));
        }
        assert_eq!(names, ["now"]);
        model.tokenizer().decode(&ids, false).unwrap()
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_response_template_chooses_the_style_before_the_chat_template() {
    let Some(cases) = std::env::var_os("HFCORE_CASES") else {
        println!("skipped: HFCORE_CASES is not set");
        return;
    };
    let cases = PathBuf::from(cases);
    let chat = "{{ messages[0].content }}{% if tools %}<tool_call>{{ tools|length }}{% endif %}";
    let mistral = json!({"version": 1, "fields": {
        "content": {"close": "</s>"},
        "tool_calls": {"open_pattern": "\\[TOOL_CALLS\\](?P<name>\\w+)\\[ARGS\\]", "content": "json"}}});
    let named = "[TOOL_CALLS]now[ARGS]{}";
    let plain = ModelOptions::default();
    for (name, response, options, style, wanted) in [
        ("shown", mistral.clone(), &plain, None, named),
        ("none", Value::Null, &plain, None, "<tool_call>"),
        ("text", json!("[TOOL_CALLS]"), &plain, None, "<tool_call>"),
        (
            "later",
            json!({"version": 9, "fields": mistral["fields"]}),
            &plain,
            None,
            "<tool_call>",
        ),
        (
            "asked",
            mistral.clone(),
            &plain,
            Some("functools"),
            "functools[",
        ),
        (
            "given",
            mistral.clone(),
            &ModelOptions {
                chat_template: Some(chat.into()),
                ..ModelOptions::default()
            },
            None,
            "<tool_call>",
        ),
    ] {
        let config = json!({"chat_template": chat, "response_template": response, "eos_token": "<|im_end|>"});
        let text = Checkpoint::new(&cases, name, config).call(options, style);
        assert!(text.starts_with(wanted), "{name}: {text:?}");
    }
    // The older form, and a template that takes no tools: the system message shows the same style.
    let schema = json!({"type": "object", "properties": {
        "tool_calls": {"x-regex-iterator": "functools\\[(.*?)\\]"}}});
    let config = json!({"chat_template": "{{ messages[0].content }}", "response_schema": schema});
    let checkpoint = Checkpoint::new(&cases, "older", config);
    assert!(checkpoint.call(&plain, None).starts_with("functools["));
}
