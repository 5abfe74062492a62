//! Ids, offsets and text against Hugging Face `tokenizers`, on real vocabularies. Needs HFCORE_CASES (a
//! folder with text/ and families/) and, for real GGUF files, HFCORE_MODELS; skips what is not there.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use hfcore_engine::tokenizer::{Detokenizer, Tokenizer};
use hfcore_engine::vocab;
use hfcore_engine::weights::Value;
use serde_json::Value as Json;

fn folder(variable: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        println!("skipped: {variable} is not set");
    }
    found
}

fn output(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}");
    output.stdout
}

fn json_file(path: &Path) -> Json {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The folder of unpacked `tokenizer.json` files.
fn tokenizers(cases: &Path) -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("case-tokenizers");
        fs::create_dir_all(&folder).unwrap();
        let archive = cases.join("text/tokenizers.tar.xz");
        output(
            Command::new("tar")
                .arg("-xJf")
                .arg(archive)
                .arg("-C")
                .arg(&folder),
        );
        folder
    })
}

fn tokenizer_json(cases: &Path, name: &str) -> PathBuf {
    tokenizers(cases).join(format!("{name}.json"))
}

/// The corpus: path within it, and text.
fn corpus(cases: &Path) -> Vec<(String, String)> {
    let root = cases.join("text/corpus");
    let mut texts = Vec::new();
    for category in fs::read_dir(&root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir())
    {
        for file in fs::read_dir(category).unwrap().map(|e| e.unwrap().path()) {
            let name = file.strip_prefix(&root).unwrap().display().to_string();
            texts.push((name, fs::read_to_string(&file).unwrap()));
        }
    }
    texts.sort();
    texts
}

#[test]
fn the_number_of_ids_is_as_recorded_for_every_document() {
    let Some(cases) = folder("HFCORE_CASES") else {
        return;
    };
    let texts: HashMap<String, String> = corpus(&cases).into_iter().collect();
    let golden = cases.join("text/tokens_golden.jsonl.gz");
    let golden = String::from_utf8(output(Command::new("gzip").arg("-dc").arg(golden))).unwrap();
    let mut known: HashMap<String, Tokenizer> = HashMap::new();
    let mut rows = 0;
    for row in golden
        .lines()
        .map(|line| serde_json::from_str::<Json>(line).unwrap())
    {
        let (Some(name), Some(file)) = (row["t"].as_str(), row["f"].as_str()) else {
            continue;
        };
        let tokenizer = known
            .entry(name.to_owned())
            .or_insert_with(|| Tokenizer::from_file(&tokenizer_json(&cases, name)).unwrap());
        let text = &texts[file];
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(Some(ids.len() as u64), row["n"].as_u64(), "{name} {file}");
        if let Some(with_special) = row["sn"].as_u64() {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(
                ids.len() as u64,
                with_special,
                "{name} {file}, with special tokens"
            );
        }
        rows += 1;
    }
    assert!(rows > 0, "no golden rows");
    println!("{rows} rows");
}

#[test]
fn streamed_text_is_the_crates_whole_text_for_every_tokenizer() {
    let Some(cases) = folder("HFCORE_CASES") else {
        return;
    };
    let texts = corpus(&cases);
    for entry in fs::read_dir(tokenizers(&cases)).unwrap() {
        let path = entry.unwrap().path();
        let tokenizer = Arc::new(Tokenizer::from_file(&path).unwrap());
        let crates = tokenizers::Tokenizer::from_file(&path).unwrap();
        for (name, text) in texts.iter().filter(|(_, text)| text.len() < 8000) {
            let ids = tokenizer.encode(text, true).unwrap();
            let late = &ids[ids.len() / 2..]; // begins within a character, or with a space
            for (ids, skip) in [(&ids[..], true), (&ids[..], false), (late, false)] {
                let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip);
                let mut streamed: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
                streamed += &detokenizer.finish();
                let whole = crates.decode(ids, skip).unwrap();
                assert_eq!(streamed, whole, "{path:?} {name} {skip}");
            }
        }
    }
}

/// GGUF metadata with the vocabulary of a `tokenizer.json`.
fn as_gguf(json: &Json, model: &str) -> HashMap<String, Value> {
    let mut rows: HashMap<u64, (String, i64)> = HashMap::new();
    for (token, id) in json["model"]["vocab"].as_object().unwrap() {
        rows.insert(id.as_u64().unwrap(), (token.clone(), 1));
    }
    for added in json["added_tokens"].as_array().unwrap() {
        let kind = if added["special"] == true { 3 } else { 4 };
        let token = added["content"].as_str().unwrap().to_owned();
        rows.insert(added["id"].as_u64().unwrap(), (token, kind));
    }
    let rows = (0..rows.len() as u64).map(|id| rows[&id].clone());
    let (tokens, types): (Vec<String>, Vec<i64>) = rows.unzip();
    let entries = [
        ("model", Value::String(model.to_owned())),
        ("tokens", Value::Strings(tokens)),
        ("token_type", Value::Ints(types)),
        ("add_bos_token", Value::Bool(false)),
    ];
    entries
        .into_iter()
        .map(|(k, v)| (format!("tokenizer.ggml.{k}"), v))
        .collect()
}

fn assert_same_ids(cases: &Path, name: &str, ours: &Tokenizer) {
    let theirs = Tokenizer::from_file(&tokenizer_json(cases, name)).unwrap();
    for (file, text) in corpus(cases) {
        let ids = ours.encode(&text, false).unwrap();
        assert_eq!(ids, theirs.encode(&text, false).unwrap(), "{name} {file}");
        let text = ours.decode(&ids, false).unwrap();
        assert_eq!(text, theirs.decode(&ids, false).unwrap(), "{name} {file}");
    }
}

#[test]
fn a_byte_level_gguf_vocabulary_has_the_ids_of_its_tokenizer_json() {
    let Some(cases) = folder("HFCORE_CASES") else {
        return;
    };
    let pairs = [
        ("gpt2", "gpt-2"),
        ("smollm2", "smollm"),
        ("falcon", "falcon"),
        ("llama3", "llama-bpe"),
        ("qwen3", "qwen2"),
        ("o200k", "gpt-4o"),
    ];
    for (name, pre) in pairs {
        let json = json_file(&tokenizer_json(&cases, name));
        let mut metadata = as_gguf(&json, "gpt2");
        let merge = |merge: &Json| match merge {
            Json::String(text) => text.clone(),
            pair => format!(
                "{} {}",
                pair[0].as_str().unwrap(),
                pair[1].as_str().unwrap()
            ),
        };
        let merges = json["model"]["merges"]
            .as_array()
            .unwrap()
            .iter()
            .map(merge)
            .collect();
        metadata.insert("tokenizer.ggml.merges".to_owned(), Value::Strings(merges));
        metadata.insert(
            "tokenizer.ggml.pre".to_owned(),
            Value::String(pre.to_owned()),
        );
        assert_same_ids(&cases, name, &vocab::tokenizer(&metadata).unwrap());
    }
}

#[test]
fn a_sentencepiece_gguf_vocabulary_has_the_ids_of_its_tokenizer_json() {
    let Some(cases) = folder("HFCORE_CASES") else {
        return;
    };
    let mut metadata = as_gguf(
        &json_file(&tokenizer_json(&cases, "llama2-legacy")),
        "llama",
    );
    // Llama 2: unk, bos, eos, 256 bytes, then pieces whose score is minus their rank; runs of spaces and
    // single characters are merged last.
    let Value::Strings(tokens) = &metadata["tokenizer.ggml.tokens"] else {
        panic!("no tokens")
    };
    let kind = |id: usize| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    };
    let score = |(id, token): (usize, &String)| match token.trim_start_matches('\u{2581}') {
        _ if id < 259 => 0.0,
        rest if rest.is_empty() || token.chars().count() == 1 => -1e9,
        _ => 259.0 - id as f32,
    };
    let types = Value::Ints((0..tokens.len()).map(kind).collect());
    let scores = Value::Floats(tokens.iter().enumerate().map(score).collect());
    metadata.insert("tokenizer.ggml.token_type".to_owned(), types);
    metadata.insert("tokenizer.ggml.scores".to_owned(), scores);
    assert_same_ids(
        &cases,
        "llama2-legacy",
        &vocab::tokenizer(&metadata).unwrap(),
    );
}

/// As much of a GGUF reader as these tests need; the engine's own has its own tests.
struct Gguf<'a>(&'a [u8]);

impl Gguf<'_> {
    fn int(&mut self, bytes: usize) -> u64 {
        let taken = self.0.split_off(..bytes).unwrap();
        taken
            .iter()
            .rev()
            .fold(0, |all, &byte| all << 8 | u64::from(byte))
    }

    fn text(&mut self) -> String {
        let bytes = self.int(8) as usize;
        String::from_utf8(self.0.split_off(..bytes).unwrap().to_vec()).unwrap()
    }

    fn float(&mut self) -> f32 {
        f32::from_bits(self.int(4) as u32)
    }

    fn number(&mut self, kind: u64) -> i64 {
        match kind {
            0 => self.int(1) as i64,
            1 => i64::from(self.int(1) as i8),
            2 => self.int(2) as i64,
            3 => i64::from(self.int(2) as i16),
            4 => self.int(4) as i64,
            5 => i64::from(self.int(4) as i32),
            10 | 11 => self.int(8) as i64,
            _ => panic!("GGUF type {kind}"),
        }
    }

    fn value(&mut self) -> Value {
        match self.int(4) {
            6 => Value::Float(f64::from(self.float())),
            7 => Value::Bool(self.int(1) != 0),
            8 => Value::String(self.text()),
            9 => {
                let (kind, n) = (self.int(4), self.int(8));
                match kind {
                    6 => Value::Floats((0..n).map(|_| self.float()).collect()),
                    7 => Value::Bools((0..n).map(|_| self.int(1) != 0).collect()),
                    8 => Value::Strings((0..n).map(|_| self.text()).collect()),
                    _ => Value::Ints((0..n).map(|_| self.number(kind)).collect()),
                }
            }
            12 => Value::Float(f64::from_bits(self.int(8))),
            kind => Value::Int(self.number(kind)),
        }
    }
}

fn gguf_metadata(path: &Path) -> HashMap<String, Value> {
    let mut head = Vec::new();
    fs::File::open(path)
        .unwrap()
        .take(64 << 20)
        .read_to_end(&mut head)
        .unwrap();
    let mut gguf = Gguf(&head[16..]); // magic, version, number of tensors
    let entries = gguf.int(8);
    (0..entries).map(|_| (gguf.text(), gguf.value())).collect()
}

fn assert_rows(name: &str, tokenizer: &Tokenizer, rows: &Json) {
    let ids = |value: &Json| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    for row in rows.as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        let plain = tokenizer.encode(text, false).unwrap();
        let Some(golden) = row.get("ids_no_special") else {
            assert_eq!(plain, ids(&row["ids"]), "{name} {text:?}");
            continue;
        };
        assert_eq!(plain, ids(golden), "{name} {text:?}");
        assert_eq!(
            tokenizer.encode(text, true).unwrap(),
            ids(&row["ids"]),
            "{name} {text:?}"
        );
    }
}

#[test]
fn tiny_gguf_files_tokenize_as_their_goldens() {
    let Some(cases) = folder("HFCORE_CASES") else {
        return;
    };
    let mut files = 0;
    for entry in fs::read_dir(cases.join("families/gguf")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        let golden = json_file(&path.with_extension("golden.json"));
        let tokenizer = vocab::tokenizer(&gguf_metadata(&path)).unwrap();
        assert_rows(&path.display().to_string(), &tokenizer, &golden["tokenize"]);
        files += 1;
    }
    assert!(files > 0, "no GGUF files");
}

#[test]
fn real_gguf_files_tokenize_as_transformers_does() {
    let (Some(cases), Some(models)) = (folder("HFCORE_CASES"), folder("HFCORE_MODELS")) else {
        return;
    };
    let golden = json_file(&cases.join("families/real_golden.json"));
    for (name, model) in golden["models"].as_object().unwrap() {
        let path = models.join(model["file"].as_str().unwrap());
        if !path.exists() {
            println!("skipped: no {}", path.display());
            continue;
        }
        let metadata = gguf_metadata(&path);
        let start = Instant::now();
        let tokenizer = vocab::tokenizer(&metadata).unwrap();
        println!(
            "{name}: built in {:?}, ends at {:?}",
            start.elapsed(),
            tokenizer.eos_ids()
        );
        assert_rows(name, &tokenizer, &model["tokenize"]);
    }
}

#[test]
fn family_directories_tokenize_as_their_goldens() {
    let Some(cases) = folder("HFCORE_CASES") else {
        return;
    };
    let mut found = 0;
    for entry in fs::read_dir(cases.join("families")).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.join("tokenizer.json").exists() || !dir.join("golden.json").exists() {
            continue;
        }
        let golden = json_file(&dir.join("golden.json"));
        if !golden["tokenize"].is_array() {
            continue;
        }
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        assert_rows(&dir.display().to_string(), &tokenizer, &golden["tokenize"]);
        found += 1;
    }
    println!("{found} families");
    assert!(found > 0, "no families");
}
