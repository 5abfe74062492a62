//! Tiny checkpoints of every family against transformers' logits. Data from HFCORE_CASES; skipped without it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hfcore_engine::arch::Arch;
use hfcore_engine::batch::{Batch, Forward, PAGE};
use hfcore_engine::cpu::Cpu;
use hfcore_engine::decoder::{Decoder, Resident};
use hfcore_engine::device::Device;
use hfcore_engine::files;

const FAMILIES: [&str; 6] = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"];

fn cases() -> Option<PathBuf> {
    match std::env::var_os("HFCORE_CASES") {
        Some(dir) => Some(PathBuf::from(dir).join("families")),
        None => {
            eprintln!("skipped: HFCORE_CASES is not set");
            None
        }
    }
}

/// (model, golden) of every case of this issue.
fn models(dir: &Path) -> Vec<(PathBuf, PathBuf)> {
    let mut all: Vec<_> = FAMILIES.iter().map(|f| (dir.join(f), dir.join(f).join("golden.json"))).collect();
    for entry in std::fs::read_dir(dir.join("gguf")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "gguf") {
            all.push((path.clone(), path.with_extension("golden.json")));
        }
    }
    all.sort();
    all
}

fn decoder<D: Device>(device: impl Fn() -> D, path: &Path) -> Decoder<D> {
    let weights = Arc::new(files::open(path).unwrap());
    let arch = Arch::read(&weights).unwrap();
    let device_of_weights = device();
    let resident = Resident::load(&device_of_weights, arch, weights, &|_, _| {}).unwrap();
    Decoder::new(device(), Arc::new(resident), 16).unwrap()
}

fn ids(json: &serde_json::Value) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// Last-position logits, the prompt fed in chunks of `chunk`.
fn logits(decoder: &mut dyn Forward, ids: &[u32], chunk: usize, original: Option<usize>) -> Vec<f32> {
    let pages: Vec<u32> = (0..ids.len().div_ceil(PAGE) as u32).rev().collect();
    let long = original.is_some_and(|n| ids.len() > n);
    let mut start = 0;
    loop {
        let end = ids.len().min(start + chunk);
        let mut batch = Batch::default();
        batch.push(&ids[start..end], start, &pages, long);
        if end == ids.len() {
            batch.outputs.push((end - start - 1) as u32);
            return decoder.forward(&batch).unwrap().to_vec();
        }
        decoder.forward(&batch).unwrap();
        start = end;
    }
}

fn log_softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().cloned().fold(f64::MIN, f64::max);
    let sum = x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    x.iter().map(|x| x - max - sum).collect()
}

fn divergence(golden: &[f64], ours: &[f32]) -> f64 {
    let a = log_softmax(golden);
    let b = log_softmax(&ours.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
    a.iter().zip(&b).map(|(a, b)| a.exp() * (a - b)).sum()
}

fn check<D: Device>(device: impl Fn() -> D + Copy, limit: f64) {
    let Some(dir) = cases() else { return };
    let mut failures = Vec::new();
    for (model, golden) in models(&dir) {
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
        let mut decoder = decoder(device, &model);
        let original = Arch::read(&files::open(&model).unwrap()).unwrap().original_context;
        let mut worst = 0f64;
        for prompt in golden["prompts"].as_array().unwrap() {
            let ids = ids(&prompt["ids"]);
            let want: Vec<f64> =
                prompt["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            let whole = logits(&mut decoder, &ids, ids.len(), original);
            let chunked = logits(&mut decoder, &ids, 7, original);
            assert_eq!(whole, chunked, "{}: chunks change the bits", model.display());
            worst = worst.max(divergence(&want, &whole[..want.len()]));
        }
        println!("{:60} KL {worst:.2e}", model.file_name().unwrap().to_string_lossy());
        if worst >= limit || worst.is_nan() {
            failures.push(format!("{}: KL {worst:.2e}", model.display()));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn the_cpu_device_is_near_transformers() {
    check(|| Cpu::new(Some(2)), 2e-2);
}
