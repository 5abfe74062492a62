//! Real chat templates against what transformers renders; the data lies under HFCORE_CASES.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use hfcore_engine::error::Error;
use hfcore_engine::template::{BIG_INT_KEY, ChatTemplate, Now, RenderRequest};
use serde_json::{Map, Value as Json, json};

/// Least number of rows and probes that must come out identical.
const ROWS_FLOOR: usize = 5791;
const PROBES_FLOOR: usize = 275;

const NOW: Now = Now {
    year: 2026,
    month: 3,
    day: 14,
    hour: 15,
    minute: 9,
    second: 26,
};

fn cases() -> Option<PathBuf> {
    let cases = std::env::var_os("HFCORE_CASES").map(|dir| Path::new(&dir).join("text"));
    if cases.is_none() {
        println!("skipped: HFCORE_CASES is not set");
    }
    cases
}

fn gunzip(path: &Path) -> String {
    let output = Command::new("gzip")
        .arg("-dc")
        .arg(path)
        .output()
        .expect("gzip runs");
    assert!(
        output.status.success(),
        "gzip -dc {} failed",
        path.display()
    );
    String::from_utf8(output.stdout).expect("the goldens are UTF-8")
}

/// JSON text with integers past 64 bits written as BIG_INT_KEY objects.
fn parse(text: &str) -> Json {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if in_string {
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
            out.push(c);
        } else if c == '-' || c.is_ascii_digit() {
            let mut number = String::from(c);
            while let Some(next) = chars.next_if(|c| "0123456789+-.eE".contains(*c)) {
                number.push(next);
            }
            let is_integer = !number.contains(['.', 'e', 'E']);
            match is_integer && number.parse::<i64>().is_err() && number.parse::<u64>().is_err() {
                true => out.push_str(&json!({ BIG_INT_KEY: number }).to_string()),
                false => out.push_str(&number),
            }
        } else {
            in_string = c == '"';
            out.push(c);
        }
    }
    serde_json::from_str(&out).expect("valid JSON")
}

fn strings(json: &Json) -> BTreeMap<String, String> {
    let pairs = json.as_object().into_iter().flatten();
    pairs
        .map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned()))
        .collect()
}

/// What differs, if anything does.
fn judge(row: &Json, got: &Result<(String, Vec<Range<usize>>), Error>) -> Option<String> {
    let wanted = row["out"].as_str();
    let is_thrown = row["thrown"] == true;
    match (row["ok"] == true, got) {
        (true, Ok((text, spans))) if Some(text.as_str()) == wanted => {
            let wanted = row["gen"].as_array()?;
            let got: Vec<Json> = spans.iter().map(|s| json!([s.start, s.end])).collect();
            (*wanted != got).then(|| format!("spans: wanted {wanted:?}, got {got:?}"))
        }
        (true, Ok((text, _))) => {
            let wanted = wanted.unwrap_or_default();
            let at = wanted
                .char_indices()
                .zip(text.chars())
                .find(|((_, a), b)| a != b);
            let at = at.map_or(wanted.len().min(text.len()), |((i, _), _)| i);
            let cut = |s: &str| {
                s.get(at..)
                    .unwrap_or_default()
                    .chars()
                    .take(80)
                    .collect::<String>()
            };
            Some(format!(
                "text at {at}: wanted {:?}, got {:?}",
                cut(wanted),
                cut(text)
            ))
        }
        (true, Err(error)) => Some(format!("must render, raised {error}")),
        (false, Ok((text, _))) => {
            let text: String = text.chars().take(60).collect();
            Some(format!(
                "must raise {} {}, rendered {text:?}",
                row["etype"], row["err"]
            ))
        }
        (
            false,
            Err(Error::Template {
                message, thrown, ..
            }),
        ) if is_thrown => {
            let wanted: String = row["err"]
                .as_str()
                .unwrap_or_default()
                .chars()
                .take(200)
                .collect();
            let same = *thrown && message.contains(&wanted);
            (!same)
                .then(|| format!("message: wanted {wanted:?}, got {message:?} (thrown: {thrown})"))
        }
        (false, Err(error)) => {
            is_thrown.then(|| format!("must be thrown by the template, got {error}"))
        }
    }
}

#[derive(Default)]
struct Tally {
    by: BTreeMap<String, (usize, usize)>,
    failures: Vec<String>,
}

impl Tally {
    fn add(&mut self, keys: &[String], failure: Option<String>) {
        for key in keys {
            let entry = self.by.entry(key.clone()).or_default();
            entry.0 += usize::from(failure.is_none());
            entry.1 += 1;
        }
        self.failures.extend(failure);
    }

    /// Print the counts; (identical, all) under `key`.
    fn report(&self, key: &str) -> (usize, usize) {
        for (key, (n, m)) in &self.by {
            println!("{key}: {n} of {m}");
        }
        for failure in self.failures.iter().take(60) {
            println!("  {failure}");
        }
        self.by.get(key).copied().unwrap_or_default()
    }
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let Some(cases) = cases() else { return };
    let contexts =
        parse(&std::fs::read_to_string(cases.join("contexts.json")).expect("contexts.json"));
    let special = strings(&contexts["special"]);
    let contexts = contexts["contexts"].as_array().expect("contexts");
    let by_id: HashMap<&str, &Json> = contexts
        .iter()
        .map(|c| (c["id"].as_str().unwrap_or(""), c))
        .collect();
    let mut templates: HashMap<String, Result<ChatTemplate, Error>> = HashMap::new();
    let mut tally = Tally::default();
    for line in gunzip(&cases.join("templates_golden.jsonl.gz")).lines() {
        let row: Json = serde_json::from_str(line).expect("a row");
        let field = |name: &str| row[name].as_str();
        let (Some(name), Some(context), Some(level)) = (field("t"), field("c"), field("level"))
        else {
            continue;
        };
        let template = templates.entry(name.to_owned()).or_insert_with(|| {
            let source =
                std::fs::read_to_string(cases.join("templates").join(name)).expect("the template");
            ChatTemplate::new(name, &source, &special)
        });
        let case = by_id[context];
        let got = match template {
            Ok(template) => template.render_with_spans(&request(case, level)),
            Err(error) => Err(error.clone()),
        };
        let failure = judge(&row, &got).map(|f| format!("{name} [{context}/{level}] {f}"));
        let tags = case["tags"].as_array().into_iter().flatten();
        let mut keys: Vec<String> = tags
            .map(|t| format!("tag {}", t.as_str().unwrap_or("")))
            .collect();
        keys.extend(["all rows".to_owned(), format!("level {level}")]);
        tally.add(&keys, failure);
    }
    let (n, m) = tally.report("all rows");
    assert!(
        n >= ROWS_FLOOR,
        "{n} of {m} rows identical, at least {ROWS_FLOOR} wanted"
    );
}

fn request(case: &Json, level: &str) -> RenderRequest {
    let given = |key: &str| Some(case[key].clone()).filter(|v| !v.is_null());
    let mut variables: Map<String, Json> = case["kwargs"].as_object().cloned().unwrap_or_default();
    let documents = variables.remove("documents").filter(|d| !d.is_null());
    let mut flag = |name: &str| {
        variables
            .remove(name)
            .and_then(|v| v.as_bool())
            .unwrap_or(false)
    };
    RenderRequest {
        messages: case["messages"].clone(),
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        tools: given("tools"),
        documents,
        now: Some(NOW),
        keep_none_keys: level != "apply",
        variables,
        ..RenderRequest::default()
    }
}

#[test]
fn probes_of_single_features_render_as_jinja2_renders_them() {
    let Some(cases) = cases() else { return };
    let text = gunzip(&cases.join("probes_golden.jsonl.gz"));
    let mut lines = text.lines();
    let meta = parse(lines.next().expect("the first line"));
    let meta = &meta["meta"];
    let special = strings(&meta["special"]);
    let mut tally = Tally::default();
    for line in lines {
        let row: Json = serde_json::from_str(line).expect("a probe");
        let source = row["tpl"].as_str().expect("a template");
        let request = RenderRequest {
            messages: meta["messages"].clone(),
            keep_none_keys: true,
            now: Some(NOW),
            variables: meta["vars"].as_object().cloned().unwrap_or_default(),
            ..Default::default()
        };
        let got = ChatTemplate::new("probe", source, &special)
            .and_then(|t| t.render_with_spans(&request));
        let failure = judge(&row, &got).map(|f| format!("{} {source:?}: {f}", row["id"]));
        let category = format!("category {}", row["cat"].as_str().unwrap_or(""));
        tally.add(&["all probes".to_owned(), category], failure);
    }
    let (n, m) = tally.report("all probes");
    assert!(
        n >= PROBES_FLOOR,
        "{n} of {m} probes identical, at least {PROBES_FLOOR} wanted"
    );
}
