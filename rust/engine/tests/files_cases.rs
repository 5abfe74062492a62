//! Opening models from disk: hostile safetensors directories, the choice of a reader, and real files (HFCORE_CASES).

use std::fs;
use std::path::{Path, PathBuf};

use hfcore_engine::error::{Error, Result};
use hfcore_engine::weights::Weights;
use hfcore_engine::{files, gguf, safetensors};
use serde_json::{Value as Json, json};

/// A directory of its own for one test, removed at its end.
struct Dir(PathBuf);

impl Dir {
    fn new(test: &str) -> Self {
        let name = format!("hfcore-files-{}-{test}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A directory with an empty `config.json`.
    fn with_config(test: &str) -> Self {
        Self::new(test).file("config.json", "{}")
    }

    fn file(self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        fs::write(self.0.join(name), bytes).unwrap();
        self
    }

    fn open(&self) -> Result<Weights> {
        safetensors::open(&self.0)
    }

    /// Opening must fail as [`Error::ModelFile`] with these words.
    fn refused(&self, words: &str) {
        match self.open().unwrap_err() {
            Error::ModelFile { path, problem } => {
                assert!(Path::new(&path).starts_with(&self.0), "{path}");
                assert!(problem.contains(words), "{problem}");
            }
            other => panic!("{other}"),
        }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // What a failed removal leaves lies in the temporary directory.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A safetensors file with this header text and `n` bytes of tensors, counting up.
fn file(header: &str, n: u8) -> Vec<u8> {
    let data: Vec<u8> = (0..n).collect();
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), &data].concat()
}

fn tensor(dtype: &str, shape: &[usize], from: usize, to: usize) -> Json {
    json!({ "dtype": dtype, "shape": shape, "data_offsets": [from, to] })
}

/// Two tensors without a gap: `a` of F32 [2, 1], `b` of BF16 [3].
fn two() -> Vec<u8> {
    let header = json!({
        "b": tensor("BF16", &[3], 8, 14),
        "__metadata__": { "format": "pt" },
        "a": tensor("F32", &[2, 1], 0, 8),
    });
    file(&header.to_string(), 14)
}

/// A checkpoint of one file with this header and `n` bytes of tensors must be refused with these words.
fn refused(test: &str, header: &str, n: u8, words: &str) {
    let dir = Dir::with_config(test).file("model.safetensors", file(header, n));
    dir.refused(words);
}

#[test]
fn a_checkpoint_keeps_its_names_and_configs() {
    let config = r#"{"model_type": "llama", "quantization_config": null}"#;
    let dir = Dir::new("plain")
        .file("config.json", config)
        .file("generation_config.json", r#"{"temperature": 0.6}"#)
        .file("model.safetensors", two());
    let w = dir.open().unwrap();
    assert_eq!(w.config.as_ref().unwrap()["model_type"], "llama");
    assert_eq!(w.generation_config.as_ref().unwrap()["temperature"], 0.6);
    assert_eq!((w.tensors.len(), w.total_bytes()), (2, 14));
    let b = w.require("b").unwrap();
    assert_eq!(b.shape, [3]);
    assert_eq!(b.data, [8, 9, 10, 11, 12, 13]);
    assert_eq!(w.require("a").unwrap().shape, [2, 1]);
}

#[test]
fn a_sharded_checkpoint_is_read_through_its_index() {
    const INDEX: &str = "model.safetensors.index.json";
    let (one, two) = ("m-1.safetensors", "m-2.safetensors");
    let shard = |name: &str| file(&json!({ name: tensor("F16", &[2], 0, 4) }).to_string(), 4);
    let index = |map: Json| json!({ "metadata": {}, "weight_map": map }).to_string();
    let dir = Dir::with_config("shards")
        .file(one, shard("a"))
        .file(two, shard("b"))
        .file("twin.safetensors", shard("a"))
        .file(INDEX, index(json!({ "a": one, "b": two })));
    let w = dir.open().unwrap();
    assert_eq!(
        (w.files.len(), w.tensors["a"].file, w.tensors["b"].file),
        (2, 0, 1)
    );

    let dir = dir.file(INDEX, index(json!({ "a": two, "b": one })));
    dir.refused("holds the tensor");
    let dir = dir.file(INDEX, index(json!({ "a": one, "c": one })));
    dir.refused("says that \"m-1.safetensors\" holds the tensor \"c\", it does not");
    let dir = dir.file(INDEX, index(json!({ "a": one, "c": "twin.safetensors" })));
    dir.refused("has the tensor \"a\" a second time");
    let dir = dir.file(INDEX, index(json!({ "a": "gone.safetensors" })));
    dir.refused("No such file");
    for outside in [
        "../m.safetensors",
        "/etc/passwd",
        "sub/m.safetensors",
        "..",
        "",
        "c:\\x",
    ] {
        let dir = Dir::with_config("outside").file(INDEX, index(json!({ "a": outside })));
        dir.refused("wanted one in the same directory");
    }
    Dir::with_config("no-index")
        .file(INDEX, "[]")
        .refused("not an index");
    Dir::with_config("no-weights").refused("has neither model.safetensors nor");
}

#[test]
fn the_config_must_be_an_object_of_bounded_size() {
    let dir = Dir::new("no-config").file("model.safetensors", two());
    dir.refused("no such file; a safetensors checkpoint needs it");
    let with = |config: &[u8]| {
        let dir = Dir::new("config").file("model.safetensors", two());
        dir.file("config.json", config)
    };
    with(b"[1]").refused("should be a JSON object");
    with(b"{").refused("not JSON");
    with(b"\xff").refused("not JSON");
    with("[".repeat(100_000).as_bytes()).refused("not JSON: recursion limit exceeded");
    with(&[b' '; (16 << 20) + 1]).refused("has more than the 16777216 bytes that are read");
    let dir = Dir::with_config("generation").file("model.safetensors", two());
    dir.file("generation_config.json", "7")
        .refused("should be a JSON object");
}

#[test]
fn a_quantised_checkpoint_is_refused_by_its_method() {
    let config = r#"{"quantization_config": {"quant_method": "aqlm"}}"#;
    let error = Dir::new("aqlm")
        .file("config.json", config)
        .open()
        .unwrap_err();
    let named =
        matches!(&error, Error::Unsupported { what: "quantisation", name, .. } if name == "aqlm");
    assert!(named, "{error}");
}

#[test]
fn a_foreign_dtype_is_named_unless_no_model_reads_the_tensor() {
    let with = |name: &str| {
        let header = json!({ name: tensor("I64", &[1], 0, 8) }).to_string();
        Dir::with_config("dtype")
            .file("model.safetensors", file(&header, 8))
            .open()
    };
    let error = with("w").unwrap_err();
    let named =
        matches!(&error, Error::Unsupported { what: "dtype", name, .. } if name == "I64 of w");
    assert!(named, "{error}");
    assert_eq!(with("embeddings.position_ids").unwrap().tensors.len(), 0);
}

#[test]
fn tensors_fill_the_file_without_gap_or_overlap() {
    let f32 = |from, to| tensor("F32", &[2], from, to);
    let one = |a: Json| json!({ "a": a }).to_string();
    let both = |a: Json, b: Json| json!({ "a": a, "b": b }).to_string();
    let after = |n: usize| format!("the one before it ends at {n}");
    refused("gap", &both(f32(0, 8), f32(12, 20)), 20, &after(8));
    refused("overlap", &both(f32(0, 8), f32(4, 12)), 12, &after(8));
    refused("first", &both(f32(4, 12), f32(12, 20)), 20, &after(0));
    refused(
        "back",
        &both(f32(0, 8), f32(8, 0)),
        8,
        "\"b\" has the bytes 8 to 0",
    );
    refused(
        "range",
        &both(f32(0, 8), f32(8, 16)),
        12,
        "cut short: tensor \"b\" ends at byte 16",
    );
    refused(
        "trail",
        &both(f32(0, 8), f32(8, 16)),
        17,
        "has 17 bytes of tensors, its header describes 16",
    );
    refused(
        "size",
        &one(f32(0, 9)),
        9,
        "of shape [2] in F32 has 9 bytes",
    );
    refused(
        "huge",
        &one(tensor("F32", &[1 << 40, 1 << 40], 0, 8)),
        8,
        "has 8 bytes",
    );
}

#[test]
fn the_header_is_strict_json() {
    let (a, b) = (tensor("F32", &[], 0, 4), tensor("F32", &[], 4, 8));
    refused(
        "twice",
        &format!("{{\"a\":{a},\"a\":{b}}}"),
        8,
        "has the tensor \"a\" a second time",
    );
    refused("json", "{", 0, "the header is wrong");
    refused("array", "[]", 0, "expected an object of tensors");
    let entry = |text: &str| format!("{{\"a\":{{\"dtype\":\"F32\",{text}}}}}");
    let extra = entry(r#""shape":[],"data_offsets":[0,4],"x":1"#);
    refused("extra", &extra, 4, "tensor \"a\": unknown field `x`");
    let minus = entry(r#""shape":[-1],"data_offsets":[0,4]"#);
    refused("minus", &minus, 4, "tensor \"a\": invalid value");
    let three = entry(r#""shape":[1],"data_offsets":[0,4,8]"#);
    refused("three", &three, 4, "the header is wrong");
}

#[test]
fn a_header_length_is_bounded_before_anything_is_read() {
    let with = |bytes: &[u8]| Dir::with_config("length").file("model.safetensors", bytes);
    with(b"").refused("cut short: a safetensors file has at least 8 bytes, this has 0");
    with(&u64::MAX.to_le_bytes()).refused("its header would have 18446744073709551615 bytes");
    with(&100_000_001_u64.to_le_bytes()).refused("at most 100000000 are read");
    with(&9_u64.to_le_bytes()).refused("cut short: the header needs 9 bytes, 0 are left");
    with(b"version https://git-lfs.github.com/spec/v1\n").refused("a Git LFS pointer");
}

#[test]
fn a_safetensors_file_cut_or_flipped_anywhere_is_safe() {
    let whole = two();
    let dir = Dir::with_config("cut");
    let path = dir.0.join("model.safetensors");
    for n in 0..whole.len() {
        fs::write(&path, &whole[..n]).unwrap();
        assert!(
            matches!(dir.open(), Err(Error::ModelFile { .. })),
            "{n} bytes"
        );
    }
    for i in 0..whole.len() - 14 {
        for flip in [0x01, 0x80, 0xff] {
            let mut bad = whole.clone();
            bad[i] ^= flip;
            fs::write(&path, &bad).unwrap();
            if let Ok(w) = dir.open() {
                assert!(
                    w.tensors.values().all(|t| t.bytes.end <= bad.len()),
                    "byte {i}"
                );
            }
        }
    }
}

#[test]
fn the_path_tells_the_reader_or_what_was_found() {
    let says = |path: &Path, words: &str| {
        let error = files::open(path).unwrap_err();
        assert!(matches!(error, Error::ModelFile { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let dir = Dir::with_config("choice");
    says(&dir.0.join("gone"), "No such file");
    says(
        &dir.0,
        "wanted one .gguf file, or model.safetensors beside config.json; found config.json",
    );
    let dir = dir.file("model.safetensors", two());
    assert_eq!(files::open(&dir.0).unwrap().tensors.len(), 2);
    says(
        &dir.0.join("model.safetensors"),
        "give the directory that holds this file",
    );
    says(
        &dir.0.join("config.json"),
        "not a GGUF file (starts with \"{}\")",
    );
    says(&Dir::new("empty").0, "found nothing");
}

#[test]
fn a_directory_opens_its_one_gguf_model() {
    // Neither keys nor tensors.
    let tiny = [b"GGUF", &3_u32.to_le_bytes()[..], &[0; 16]].concat();
    let dir = Dir::new("ggufs")
        .file("a.gguf", &tiny)
        .file("b-00002-of-00002.gguf", &tiny);
    let a = dir.0.join("a.gguf").display().to_string();
    assert_eq!(files::open(&dir.0).unwrap().path, a);
    let dir = dir.file("b.gguf", &tiny);
    let error = files::open(&dir.0).unwrap_err().to_string();
    assert!(
        error.ends_with("holds 2 GGUF models, name one of them: a.gguf, b.gguf"),
        "{error}"
    );
}

#[test]
fn a_directory_in_place_of_a_file_is_an_error() {
    let dir = Dir::with_config("dir");
    fs::create_dir(dir.0.join("model.safetensors")).unwrap();
    dir.refused("not a regular file");
    let error = gguf::open(&dir.0).unwrap_err();
    assert!(error.to_string().ends_with("not a regular file"), "{error}");
    fs::create_dir(dir.0.join("generation_config.json")).unwrap();
    dir.refused("not a regular file");
}

// Real files

/// The families of the acceptance data, or `None` where it is not on this machine.
fn families() -> Option<PathBuf> {
    let cases = std::env::var_os("HFCORE_CASES");
    if cases.is_none() {
        println!("skipped: HFCORE_CASES is not set");
    }
    cases.map(|path| PathBuf::from(path).join("families"))
}

/// The entries of `dir` that hold, or are, such a file.
fn entries(dir: &Path, wanted: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    paths.filter(|p| wanted(p)).collect()
}

/// Every tensor can be dequantised, and its numbers are sane.
fn check(w: &Weights) {
    assert!(!w.tensors.is_empty(), "{w:?}");
    for name in w.tensors.keys() {
        let t = w.require(name).unwrap();
        let row_bytes = t.tensor_type.row_bytes(t.cols()).unwrap();
        assert_eq!(t.data.len(), t.rows() * row_bytes, "{name}");
        assert_eq!(t.row(t.rows() - 1).len(), row_bytes);
        let sane = |x: &f32| x.is_finite() && x.abs() < 100.0;
        assert!(t.dequantize().iter().all(sane), "{w:?} {name}");
    }
}

#[test]
fn every_family_opens() {
    let Some(families) = families() else { return };
    let dirs = entries(&families, |p| p.join("config.json").exists());
    assert!(dirs.len() >= 10, "{dirs:?}");
    for dir in dirs {
        check(&files::open(&dir).unwrap());
    }
    assert_eq!(
        files::open(&families.join("mistral")).unwrap().files.len(),
        3
    );
}

#[test]
fn every_gguf_opens_and_says_its_architecture() {
    let Some(families) = families() else { return };
    let ggufs = entries(&families.join("gguf"), |p| {
        p.extension().is_some_and(|e| e == "gguf")
    });
    assert!(ggufs.len() >= 10, "{ggufs:?}");
    for path in ggufs {
        let w = files::open(&path).unwrap();
        check(&w);
        let architecture = w.get_str("general.architecture").unwrap().unwrap();
        let blocks = w.get_u32(&format!("{architecture}.block_count")).unwrap();
        assert!(blocks.is_some_and(|n| n > 0), "{w:?}");
        let tokens = w.get_strings("tokenizer.ggml.tokens").unwrap();
        assert!(tokens.is_some_and(|t| t.len() > 100), "{w:?}");
    }
}

#[test]
fn every_quantised_checkpoint_has_its_matrices_whole() {
    let Some(families) = families() else { return };
    for dir in entries(&families.join("quant"), |p| p.join("config.json").exists()) {
        let weights = files::open(&dir).unwrap();
        check(&weights);
        assert!(weights.packed.is_empty(), "{}", dir.display());
        let query = "model.layers.0.self_attn.q_proj.weight";
        assert_eq!(
            weights.quantised[query].shape,
            [128, 128],
            "{}",
            dir.display()
        );
    }
}
