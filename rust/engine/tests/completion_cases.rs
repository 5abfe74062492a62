//! Several completions and prompt log probabilities on tiny real checkpoints: bit for bit what requests of their own
//! give. Data from HFCORE_CASES; skipped without it.

use std::path::PathBuf;

use hfcore_engine::model::{Model, ModelOptions, Prompt};
use hfcore_engine::sequence::TokenLogprob;
use serde_json::{Value as Json, json};

const MODELS: [&str; 3] = ["llama-q8_0", "gemma3-q4_0", "llama256-q4_k_m"];

fn models() -> Vec<Model> {
    let Some(cases) = std::env::var_os("HFCORE_CASES") else {
        println!("skipped: HFCORE_CASES is not set");
        return Vec::new();
    };
    let dir = PathBuf::from(cases).join("families/gguf");
    let options = ModelOptions {
        max_sequences: 4,
        ..ModelOptions::default()
    };
    let open = |name: &&str| {
        Model::open(&dir.join(format!("{name}.gguf")), &options, &|_, _| true).unwrap()
    };
    MODELS.iter().map(open).collect()
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|i| 3 + i * 37 % 200).collect()
}

/// The tokens of each completion with their log probabilities, and the prompt's.
#[derive(Default, PartialEq, Debug)]
struct Answer {
    completions: Vec<Vec<TokenLogprob>>,
    prompt: Option<Vec<TokenLogprob>>,
}

fn ask(model: &Model, length: u32, options: Json) -> Answer {
    let n = options["n"].as_u64().unwrap_or(1) as usize;
    let stream = model.submit(Prompt::Ids(prompt(length)), options).unwrap();
    let mut answer = Answer {
        completions: vec![Vec::new(); n],
        prompt: None,
    };
    for delta in stream {
        let delta = delta.unwrap();
        answer.completions[delta.index].extend(delta.logprobs);
        answer.prompt = answer.prompt.or(delta.prompt_logprobs);
    }
    answer
}

#[test]
fn completions_on_shared_pages_are_bit_for_bit_those_of_requests_alone() {
    for model in models() {
        for length in [1, 16, 17, 40, 70] {
            let options = |seed: u64, n: usize| {
                json!({"temperature": 1.5, "seed": seed, "n": n, "max_tokens": 12, "top_logprobs": 3,
                    "ignore_eos": true})
            };
            let together = ask(&model, length, options(7, 3)).completions;
            for (i, completion) in together.iter().enumerate() {
                assert_eq!(completion.len(), 12);
                let alone = ask(&model, length, options(7 + i as u64, 1));
                assert_eq!(*completion, alone.completions[0], "{length} tokens, {i}");
            }
        }
    }
}

#[test]
fn a_prompts_logprobs_are_those_of_its_logits_whatever_runs_beside_it() {
    for model in models() {
        let options = json!({"prompt_logprobs": true, "top_logprobs": 2, "max_tokens": 3});
        // More rows than have their logits made in a step.
        let ids = prompt(100);
        let alone = ask(&model, 100, options.clone());
        let busy = json!({"max_tokens": 60, "ignore_eos": true, "n": 3});
        let beside = model.submit(Prompt::Ids(prompt(33)), busy).unwrap();
        assert_eq!(ask(&model, 100, options), alone);
        drop(beside);
        let logits = model.logits(&ids, false, None).unwrap();
        let rows = logits.chunks_exact(logits.len() / ids.len());
        let judged = alone.prompt.unwrap();
        assert_eq!(judged.len(), 99);
        for ((row, judged), token) in rows.zip(&judged).zip(&ids[1..]) {
            let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            let want = f64::from(row[*token as usize]) - total.ln();
            assert_eq!((judged.token, judged.top.len()), (*token, 2));
            assert!((f64::from(judged.logprob) - want).abs() < 1e-4);
        }
    }
}
