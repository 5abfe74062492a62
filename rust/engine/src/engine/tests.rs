//! Tests of engine.rs.

use std::time::Instant;

use super::core::LOGIT_ROWS;
use super::*;
use crate::batch::{Batch, Caller};
use crate::sequence::Text;
use crate::sequence::{Delta, FinishReason};
use crate::stream::Notifier;

const VOCAB: usize = 64;
const EOS: u32 = 63;
/// A prompt with one of these makes the fake panic, or fail.
const POISON: u32 = 62;
const BAD: u32 = 61;

/// A decoder whose logits are a hash of all tokens so far, read back from its pages: whoever
/// writes into another's page, or leaves a position out, changes the text.
struct Fake {
    slots: Vec<u32>,
    logits: Vec<f32>,
    plan: Plan,
}

/// What the fakes of a test share with it.
#[derive(Clone, Default)]
struct Plan {
    /// Held by the test to stop the decoder before a step.
    gate: Arc<Mutex<()>>,
    built: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
    /// How many decoders fail to be built.
    refuse: Arc<AtomicU64>,
    /// The most rows and outputs a step had.
    most: Arc<Mutex<(usize, usize)>>,
    /// The most pages a step had, shared ones counted once.
    most_pages: Arc<AtomicU64>,
    /// Rows of all steps.
    rows: Arc<AtomicU64>,
    /// The likeliest token is the one so many places before, if that is above 0.
    echo: Arc<AtomicU64>,
    /// Milliseconds that a step takes: as a model's, much the same for few rows.
    slow: Arc<AtomicU64>,
    /// The tokens that ran at position 0, in turn.
    first: Arc<Mutex<Vec<u32>>>,
}

impl Forward for Fake {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn page_bytes(&self) -> Option<usize> {
        Some(4 * PAGE)
    }

    fn read_page(&self, page: u32, out: &mut Vec<u8>) {
        out.extend(bytes_of(&self.slots[page as usize * PAGE..][..PAGE]));
    }

    fn write_page(&mut self, page: u32, bytes: &[u8]) {
        let (numbers, _) = bytes.as_chunks();
        let slots = &mut self.slots[page as usize * PAGE..][..PAGE];
        slots
            .iter_mut()
            .zip(numbers)
            .for_each(|(slot, n)| *slot = u32::from_le_bytes(*n));
    }

    fn forward(&mut self, batch: &Batch, caller: &mut dyn Caller) -> Result<&[f32]> {
        drop(lock(&self.plan.gate));
        if caller.gone() {
            return Ok(&[]);
        }
        {
            let mut most = lock(&self.plan.most);
            *most = (
                most.0.max(batch.tokens.len()),
                most.1.max(batch.outputs.len()),
            );
        }
        let rows = batch.tokens.len() as u64;
        self.plan.rows.fetch_add(rows, Ordering::SeqCst);
        let echo = self.plan.echo.load(Ordering::SeqCst) as usize;
        let slow = self.plan.slow.load(Ordering::SeqCst);
        if slow > 0 {
            std::thread::sleep(Duration::from_millis(slow));
        }
        let pages: std::collections::BTreeSet<u32> = batch.pages.iter().copied().collect();
        let pages = pages.len() as u64;
        self.plan.most_pages.fetch_max(pages, Ordering::SeqCst);
        let mut written = std::collections::BTreeSet::new();
        self.logits.clear();
        for span in &batch.spans {
            let pages = &batch.pages[span.first_page..span.first_page + span.pages];
            let slot = |position: usize| pages[position / PAGE] as usize * PAGE + position % PAGE;
            for row in span.first_row..span.first_row + span.rows {
                assert_ne!(batch.tokens[row], POISON, "poison");
                if batch.tokens[row] == BAD {
                    return Err(Error::OutOfMemory {
                        needed: 2,
                        available: 1,
                    });
                }
                let position = batch.positions[row] as usize;
                if position == 0 {
                    lock(&self.plan.first).push(batch.tokens[row]);
                }
                assert!(written.insert(slot(position)), "two write to one slot");
                self.slots[slot(position)] = batch.tokens[row];
                if batch.outputs.contains(&(row as u32)) {
                    let history = (0..=position).map(|p| self.slots[slot(p)]);
                    push_logits(history, &mut self.logits);
                    if echo > 0 {
                        let at = self.logits.len() - VOCAB;
                        let token = self.slots[slot((position + 1).saturating_sub(echo))];
                        self.logits[at + token as usize] = 50.0;
                    }
                }
            }
        }
        Ok(&self.logits)
    }
}

/// The bytes of a page's tokens.
fn bytes_of(tokens: &[u32]) -> impl Iterator<Item = u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes())
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.plan.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

fn push_logits(history: impl Iterator<Item = u32>, logits: &mut Vec<f32>) {
    let mut hash = history.fold(0xCBF2_9CE4_8422_2325u64, |hash, token| {
        (hash ^ u64::from(token))
            .wrapping_mul(0x0100_0000_01B3)
            .rotate_left(17)
    });
    for id in 0..VOCAB {
        hash = hash
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let logit = (hash >> 40) as f32 / (1 << 22) as f32;
        logits.push(if id as u32 >= BAD && id as u32 != EOS {
            -50.0
        } else {
            logit
        });
    }
}

struct Letters;

impl Text for Letters {
    fn push(&mut self, id: u32) -> String {
        char::from(b'0' + id as u8).to_string()
    }

    fn finish(&mut self) -> String {
        String::new()
    }
}

fn config(pages: u32) -> EngineConfig {
    EngineConfig {
        token_budget: 16,
        max_sequences: 8,
        ..EngineConfig::new(VOCAB, 200, pages)
    }
}

fn engine_of(config: EngineConfig, plan: &Plan) -> Engine {
    let (plan, pages) = (plan.clone(), config.pages);
    let factory: Factory = Arc::new(move || {
        plan.built.fetch_add(1, Ordering::SeqCst);
        let refused = plan
            .refuse
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        if refused.is_ok() {
            return Err(Error::OutOfMemory {
                needed: 9,
                available: 3,
            });
        }
        let slots = vec![0; pages as usize * PAGE];
        Ok(Box::new(Fake {
            slots,
            logits: Vec::new(),
            plan: plan.clone(),
        }))
    });
    Engine::new(factory, config).unwrap()
}

fn engine(pages: u32) -> Engine {
    engine_of(config(pages), &Plan::default())
}

fn request(ids: Vec<u32>, options: Options) -> Request {
    Request {
        ids,
        options,
        text: Box::new(|| (Box::new(Letters) as Box<dyn Text>).into()),
        long: false,
        adapter: None,
        eos_ids: vec![EOS],
    }
}

fn tokens(n: usize) -> Options {
    Options {
        max_tokens: Some(n),
        ignore_eos: true,
        ..Options::default()
    }
}

fn random(state: &mut u64, n: usize) -> usize {
    *state = state
        .wrapping_mul(6364136223846793005)
        .wrapping_add(1442695040888963407);
    (*state >> 33) as usize % n
}

/// Requests of every kind: short and long, greedy and sampled, with stops and penalties.
fn requests(count: usize) -> Vec<(Vec<u32>, Options)> {
    let mut state = 11;
    let request = |i| {
        let ids = (0..1 + random(&mut state, 60))
            .map(|_| random(&mut state, 60) as u32)
            .collect();
        let options = Options {
            max_tokens: (i % 4 > 0).then_some(1 + random(&mut state, 50)),
            do_sample: i % 2 == 1,
            temperature: 0.7,
            top_k: 20,
            seed: Some(i as u64),
            repetition_penalty: if i % 3 == 0 { 1.3 } else { 1.0 },
            stop: if i % 5 == 0 {
                vec!["A".into(), "3".into()]
            } else {
                vec![]
            },
            ignore_eos: i % 7 == 1,
            logprobs: i % 3 == 1,
            ..Options::default()
        };
        (ids, options)
    };
    (0..count).map(request).collect()
}

/// All of a stream as one delta, times left out.
fn collect(stream: Stream) -> Result<Delta> {
    let mut whole = Delta::default();
    for delta in stream {
        let delta = delta?;
        assert_ne!(delta.token_ids.len(), 0);
        whole.text += &delta.text;
        whole.token_ids.extend(delta.token_ids);
        whole.logprobs.extend(delta.logprobs);
        whole.finish_reason = delta.finish_reason;
        assert_eq!(delta.usage.is_some(), delta.finish_reason.is_some());
    }
    Ok(whole)
}

/// Each request, `n` completions of it.
fn submit_all(engine: &Engine, requests: &[(Vec<u32>, Options)], n: usize) -> Vec<Stream> {
    let submit = |(ids, options): &(Vec<u32>, Options)| {
        engine.submit(request(ids.clone(), several(options, n)))
    };
    requests.iter().map(submit).collect::<Result<_>>().unwrap()
}

fn alone(requests: &[(Vec<u32>, Options)]) -> Vec<Delta> {
    let engine = engine_of(
        EngineConfig {
            token_budget: 512,
            ..config(64)
        },
        &Plan::default(),
    );
    let run = |(ids, options): &(Vec<u32>, Options)| {
        collect(
            engine
                .submit(request(ids.clone(), options.clone()))
                .unwrap(),
        )
        .unwrap()
    };
    requests.iter().map(run).collect()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed().as_secs() < 20, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn assert_nothing_held(engine: &Engine) {
    wait_until("all pages back", || {
        let metrics = engine.metrics();
        (metrics.pages_used, metrics.running, metrics.waiting) == (0, 0, 0)
    });
}

#[test]
fn batched_is_alone_token_for_token_whatever_the_chunks_and_the_cache() {
    let requests = requests(24);
    let alone = alone(&requests);
    assert!(
        alone
            .iter()
            .any(|d| d.finish_reason == Some(FinishReason::Stop))
    );
    assert!(
        alone
            .iter()
            .any(|d| d.finish_reason == Some(FinishReason::Length))
    );
    for (pages, token_budget) in [(200, 512), (200, 16), (40, 9), (13, 33), (13, 8)] {
        let plan = Plan::default();
        let config = EngineConfig {
            token_budget,
            ..config(pages)
        };
        let engine = engine_of(config.clone(), &plan);
        let gate = lock(&plan.gate);
        let streams = submit_all(&engine, &requests, 1);
        drop(gate);
        for (i, (stream, alone)) in streams.into_iter().zip(&alone).enumerate() {
            assert_eq!(&collect(stream).unwrap(), alone, "request {i}, {config:?}");
        }
        assert_nothing_held(&engine);
        let (rows, outputs) = *lock(&plan.most);
        assert!(rows <= token_budget && outputs <= config.max_sequences.max(LOGIT_ROWS));
        assert!(outputs > 1, "nothing ran together");
        assert_eq!(engine.metrics().preemptions > 0, pages == 13, "{config:?}");
    }
}

/// A decoder over the vocabulary of `constraint::tests` that computes what may come alone, unless `whole`. Rows that could
/// be restricted are counted.
struct Asking {
    whole: bool,
    restricted: Arc<AtomicU64>,
    logits: Vec<f32>,
}

const ASKING_VOCAB: usize = 268;

impl Forward for Asking {
    fn vocab_size(&self) -> usize {
        ASKING_VOCAB
    }

    fn forward(&mut self, batch: &Batch, caller: &mut dyn Caller) -> Result<&[f32]> {
        // As long as layers might take, so that masks are there.
        std::thread::sleep(Duration::from_millis(1));
        self.logits.clear();
        for (output, &row) in batch.outputs.iter().enumerate() {
            let (token, position) = (batch.tokens[row as usize], batch.positions[row as usize]);
            let mut hash = u64::from(token) << 20 | u64::from(position);
            let logits = (0..ASKING_VOCAB).map(|_| random(&mut hash, 1 << 20) as f32 / 1e5);
            let first = self.logits.len();
            self.logits.extend(logits);
            if let (false, Some(mask)) = (self.whole, caller.allowed(output)) {
                self.restricted.fetch_add(1, Ordering::SeqCst);
                for (id, logit) in self.logits[first..].iter_mut().enumerate() {
                    if mask[id / 32] >> (id % 32) & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
        Ok(&self.logits)
    }
}

#[test]
fn a_grammars_text_is_the_same_whether_what_it_forbids_was_computed_or_not() {
    use crate::constraint::tests::{END, grammars};
    use crate::constraint::{Constraint, Rule, Source};
    struct Bytes;
    impl Text for Bytes {
        fn push(&mut self, id: u32) -> String {
            format!("{id} ")
        }
        fn finish(&mut self) -> String {
            String::new()
        }
    }
    let grammars = grammars(true);
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "name": {"enum": ["na", "name", "other"]},
            "size": {"type": "integer"},
            "note": {"type": "string"},
        },
        "required": ["name", "size", "note"],
    });
    let schema = Source::JsonSchema(schema).lark().unwrap();
    let rule = Rule::Grammar(grammars.compile(&schema).unwrap());
    let submit = |engine: &Engine, i: usize| {
        let (grammars, rule) = (grammars.clone(), rule.clone());
        let options = Options {
            max_tokens: Some(60),
            do_sample: i % 2 == 1,
            temperature: 1.5,
            top_p: 0.95,
            seed: Some(i as u64),
            frequency_penalty: 0.2,
            logprobs: true,
            top_logprobs: 4,
            prompt_logprobs: i == 4,
            ..Options::default()
        };
        let text = Box::new(move || Parts {
            // The third has no grammar.
            constraint: (i != 2).then(|| Constraint::new(grammars.clone(), &rule)),
            ..(Box::new(Bytes) as Box<dyn Text>).into()
        });
        let request = Request {
            ids: vec![65 + i as u32; 20],
            options,
            text,
            long: false,
            adapter: None,
            eos_ids: vec![END],
        };
        engine.submit(request).unwrap()
    };
    let all = |stream: Stream| {
        let deltas = stream.map(|delta| {
            let delta = delta.unwrap();
            (delta.token_ids, delta.logprobs, delta.finish_reason)
        });
        deltas.collect::<Vec<_>>()
    };
    let engine = |whole: bool| {
        let restricted = Arc::new(AtomicU64::new(0));
        let counted = restricted.clone();
        let factory: Factory = Arc::new(move || {
            Ok(Box::new(Asking {
                whole,
                restricted: counted.clone(),
                logits: Vec::new(),
            }))
        });
        let config = EngineConfig::new(ASKING_VOCAB, 200, 64);
        (Engine::new(factory, config).unwrap(), restricted)
    };
    let ((whole, none), (few, restricted)) = (engine(true), engine(false));
    let wanted: Vec<_> = (0..6).map(|i| all(submit(&whole, i))).collect();
    let alone: Vec<_> = (0..6).map(|i| all(submit(&few, i))).collect();
    assert_eq!(alone, wanted);
    let streams: Vec<_> = (0..6).map(|i| submit(&few, i)).collect();
    let together: Vec<_> = streams.into_iter().map(all).collect();
    assert_eq!(together, wanted);
    assert_eq!(none.load(Ordering::SeqCst), 0);
    assert!(
        restricted.load(Ordering::SeqCst) > 50,
        "{restricted:?} rows"
    );
}

#[test]
fn requests_that_leave_give_all_pages_back_and_disturb_nobody() {
    let requests = requests(40);
    let alone = alone(&requests);
    let mut state = 5;
    for _ in 0..10 {
        let token_budget = 8 + random(&mut state, 60);
        let engine = engine_of(
            EngineConfig {
                token_budget,
                ..config(20)
            },
            &Plan::default(),
        );
        let mut kept = Vec::new();
        for (i, (ids, options)) in requests.iter().enumerate() {
            let mut stream = engine
                .submit(request(ids.clone(), options.clone()))
                .unwrap();
            match random(&mut state, 4) {
                0 => drop(stream),
                1 => stream.cancel(),
                2 => drop(stream.next()),
                _ => kept.push((i, stream)),
            }
        }
        for (i, stream) in kept {
            assert_eq!(collect(stream).unwrap(), alone[i]);
        }
        assert_nothing_held(&engine);
    }
}

#[test]
fn a_panic_ends_the_requests_of_its_step_and_the_engine_lives_on() {
    let plan = Plan::default();
    let engine = engine_of(config(100), &plan);
    let requests = requests(1);
    let alone = alone(&requests);
    let gate = lock(&plan.gate);
    let before = engine.submit(request(vec![1], tokens(1))).unwrap();
    wait_until("the first step", || engine.metrics().steps == 1);
    let poisoned = engine.submit(request(vec![1, POISON], tokens(5))).unwrap();
    // Its 30 tokens fill the step.
    let beside = engine.submit(request(vec![3; 30], tokens(5))).unwrap();
    let later = Options {
        priority: -1,
        ..requests[0].1.clone()
    };
    let spared = engine
        .submit(request(requests[0].0.clone(), later))
        .unwrap();
    drop(gate);
    assert!(collect(before).is_ok());
    for hit in [poisoned, beside] {
        let error = collect(hit).unwrap_err();
        assert!(
            matches!(&error, Error::Internal(text) if text.contains("poison")),
            "{error}"
        );
    }
    assert_eq!(collect(spared).unwrap(), alone[0]);
    assert_eq!(plan.built.load(Ordering::SeqCst), 2);
    assert_nothing_held(&engine);
}

#[test]
fn who_decodes_beside_a_panic_fails_and_who_waits_for_its_prompt_runs_again() {
    let engine = engine(100);
    assert!(engine.logits(vec![POISON], true, false).is_err());
    let fine = engine.submit(request(vec![1, 2], tokens(3))).unwrap();
    assert_eq!(collect(fine).unwrap().token_ids.len(), 3);
    assert_nothing_held(&engine);
}

#[test]
fn a_failed_step_reaches_its_requests_at_once() {
    let engine = engine(100);
    let start = Instant::now();
    let error = collect(engine.submit(request(vec![1, BAD], tokens(5))).unwrap()).unwrap_err();
    assert!(matches!(
        error,
        Error::OutOfMemory {
            needed: 2,
            available: 1
        }
    ));
    assert!(start.elapsed().as_secs() < 2);
    assert_nothing_held(&engine);
}

#[test]
fn a_decoder_that_cannot_be_made_fails_the_requests_and_is_tried_again() {
    let plan = Plan::default();
    plan.refuse.store(1, Ordering::SeqCst);
    let engine = engine_of(config(100), &plan);
    let error = collect(engine.submit(request(vec![1], tokens(2))).unwrap()).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { needed: 9, .. }));
    assert!(collect(engine.submit(request(vec![1], tokens(2))).unwrap()).is_ok());
}

#[test]
fn closing_ends_what_runs_and_what_waits_and_the_thread() {
    let plan = Plan::default();
    let engine = engine_of(
        EngineConfig {
            max_sequences: 1,
            ..config(100)
        },
        &plan,
    );
    let mut running = engine
        .submit(request(
            vec![1],
            Options {
                ignore_eos: true,
                ..Options::default()
            },
        ))
        .unwrap();
    assert!(running.next().unwrap().is_ok());
    let waiting = engine.submit(request(vec![2], tokens(5))).unwrap();
    engine.close();
    assert_eq!(plan.dropped.load(Ordering::SeqCst), 1);
    let last = running.last();
    assert!(matches!(
        last,
        Some(Err(Error::Closed))
            | Some(Ok(Delta {
                finish_reason: Some(_),
                ..
            }))
    ));
    assert!(matches!(collect(waiting), Err(Error::Closed) | Ok(_)));
    assert!(matches!(
        engine.submit(request(vec![1], tokens(1))),
        Err(Error::Closed)
    ));
    assert!(matches!(
        engine.logits(vec![1], true, false),
        Err(Error::Closed)
    ));
    engine.close();
}

#[test]
fn a_dropped_engine_leaves_no_thread() {
    let plan = Plan::default();
    let engine = engine_of(config(100), &plan);
    let stream = engine.submit(request(vec![1], tokens(150))).unwrap();
    wait_until("a decoder", || plan.built.load(Ordering::SeqCst) == 1);
    drop(engine);
    assert_eq!(plan.dropped.load(Ordering::SeqCst), 1);
    assert!(matches!(collect(stream), Err(Error::Closed) | Ok(_)));
}

#[test]
fn an_engine_without_work_sleeps() {
    let engine = engine(100);
    collect(engine.submit(request(vec![1], tokens(3))).unwrap()).unwrap();
    assert_nothing_held(&engine);
    let steps = engine.metrics().steps;
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(engine.metrics().steps, steps);
    assert_eq!(steps, 3);
}

#[test]
fn a_full_queue_refuses() {
    let plan = Plan::default();
    let config = EngineConfig {
        queue_limit: 2,
        max_sequences: 1,
        ..config(100)
    };
    let engine = engine_of(config, &plan);
    let gate = lock(&plan.gate);
    let mut streams = vec![engine.submit(request(vec![1], tokens(1))).unwrap()];
    wait_until("the first step", || engine.metrics().steps == 1);
    streams.push(engine.submit(request(vec![1], tokens(1))).unwrap());
    streams.push(engine.submit(request(vec![1], tokens(1))).unwrap());
    let refused = engine.submit(request(vec![1], tokens(1)));
    assert!(matches!(
        refused,
        Err(Error::Overloaded {
            waiting: 2,
            limit: 2
        })
    ));
    drop(gate);
    streams
        .into_iter()
        .for_each(|stream| drop(collect(stream).unwrap()));
}

#[test]
fn a_request_ends_with_its_timeout_running_or_waiting() {
    let plan = Plan::default();
    let engine = engine_of(
        EngineConfig {
            max_sequences: 1,
            ..config(100)
        },
        &plan,
    );
    let gate = lock(&plan.gate);
    let late = Options {
        timeout: Some(Duration::from_millis(5)),
        ..tokens(100)
    };
    let running = engine.submit(request(vec![1], late.clone())).unwrap();
    let waiting = engine.submit(request(vec![2], late)).unwrap();
    std::thread::sleep(Duration::from_millis(10));
    drop(gate);
    for stream in [running, waiting] {
        assert!(matches!(collect(stream), Err(Error::Timeout { .. })));
    }
    assert_nothing_held(&engine);
}

#[test]
fn requests_no_engine_could_run_are_refused_at_submit() {
    let engine = engine(4);
    let refused = |ids: Vec<u32>, options| {
        engine
            .submit(request(ids, options))
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refused(vec![], tokens(1)),
        "prompt must have at least 1 token, got 0"
    );
    assert_eq!(
        refused(vec![1, 64], tokens(1)),
        "a prompt's token ids must be below the vocabulary's size 64, got 64"
    );
    assert_eq!(
        refused(vec![1; 64], tokens(1)),
        "prompt has 64 tokens, the context holds 64"
    );
    let biased = Options {
        logit_bias: vec![(99, 1.0)],
        ..tokens(1)
    };
    assert!(refused(vec![1], biased).starts_with("logit_bias must be below"));
    assert_eq!(engine.metrics().requests, 0);
    assert!(matches!(
        engine.logits(vec![], true, false),
        Err(Error::InvalidRequest(_))
    ));
    assert!(engine.logits(vec![1; 65], true, false).is_err());
}

#[test]
fn sizes_that_cannot_work_are_refused() {
    let factory: Factory = Arc::new(|| Err(Error::Closed));
    for config in [
        EngineConfig {
            pages: 0,
            ..config(1)
        },
        EngineConfig {
            max_sequences: 0,
            ..config(1)
        },
        EngineConfig {
            token_budget: 7,
            max_sequences: 8,
            ..config(1)
        },
        EngineConfig {
            context_size: 1,
            ..config(1)
        },
    ] {
        assert!(matches!(
            Engine::new(factory.clone(), config),
            Err(Error::InvalidRequest(_))
        ));
    }
}

#[test]
fn a_decoder_of_another_vocabulary_is_refused() {
    let engine = engine_of(
        EngineConfig {
            vocab_size: 65,
            ..config(4)
        },
        &Plan::default(),
    );
    let error = collect(engine.submit(request(vec![1], tokens(1))).unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "internal error: the decoder must have 65 logits per row, it has 64"
    );
}

#[test]
fn logits_in_chunks_are_the_logits_of_the_whole() {
    let engine = engine(100);
    let ids: Vec<u32> = (0..50).map(|i| i * 7 % 60).collect();
    let mut want = Vec::new();
    (1..=ids.len()).for_each(|n| push_logits(ids[..n].iter().copied(), &mut want));
    let busy = engine.submit(request(vec![1, 2], tokens(40))).unwrap();
    assert_eq!(engine.logits(ids.clone(), false, false).unwrap(), want);
    assert_eq!(engine.logits(ids, true, false).unwrap(), want[49 * VOCAB..]);
    collect(busy).unwrap();
    assert_nothing_held(&engine);
}

#[test]
fn a_prompts_logprobs_in_chunks_and_beside_others_are_those_of_its_logits() {
    let asked = |top_logprobs| Options {
        prompt_logprobs: true,
        top_logprobs,
        logit_bias: vec![(1, 50.0)],
        ..tokens(30)
    };
    let prompts: Vec<Vec<u32>> = (0..6)
        .map(|p| (0..20 * p + 1).map(|i| (i * 7 + p) % 60).collect())
        .collect();
    for (pages, token_budget) in [(200, 512), (200, 9), (13, 64), (13, 8)] {
        let plan = Plan::default();
        let config = EngineConfig {
            token_budget,
            ..config(pages)
        };
        let engine = engine_of(config.clone(), &plan);
        let gate = lock(&plan.gate);
        let submit = |(i, ids): (usize, &Vec<u32>)| {
            engine.submit(request(ids.clone(), asked(i % 3))).unwrap()
        };
        let streams: Vec<Stream> = prompts.iter().enumerate().map(submit).collect();
        drop(gate);
        for (i, (mut stream, ids)) in streams.into_iter().zip(&prompts).enumerate() {
            let first = stream.next().unwrap().unwrap();
            assert!(stream.all(|delta| delta.unwrap().prompt_logprobs.is_none()));
            let judged = first.prompt_logprobs.unwrap();
            assert_eq!(judged.len(), ids.len() - 1);
            for (n, judged) in judged.iter().enumerate() {
                let mut logits = Vec::new();
                push_logits(ids[..=n].iter().copied(), &mut logits);
                let total: f32 = logits.iter().map(|x| x.exp()).sum();
                assert_eq!((judged.token, judged.top.len()), (ids[n + 1], i % 3));
                let want = logits[ids[n + 1] as usize] - total.ln();
                assert!((judged.logprob - want).abs() < 1e-4, "{n} of {config:?}");
            }
        }
        assert_nothing_held(&engine);
        assert!(lock(&plan.most).1 <= config.max_sequences + LOGIT_ROWS);
        assert_eq!(engine.metrics().preemptions > 0, pages == 13, "{config:?}");
    }
}

/// The completions of a stream, each as one delta, times left out.
fn collect_all(stream: Stream, n: usize) -> Vec<Delta> {
    let mut all = vec![Delta::default(); n];
    for delta in stream {
        let delta = delta.unwrap();
        let whole = &mut all[delta.index];
        assert_eq!(whole.finish_reason, None);
        whole.text += &delta.text;
        whole.token_ids.extend(delta.token_ids);
        whole.logprobs.extend(delta.logprobs);
        whole.finish_reason = delta.finish_reason;
        let counts = delta.usage.map(|u| u.completion_tokens);
        assert_eq!(counts, delta.finish_reason.map(|_| whole.token_ids.len()));
    }
    all
}

fn several(options: &Options, n: usize) -> Options {
    Options {
        n,
        ..options.clone()
    }
}

#[test]
fn greedy_completions_are_equal_and_share_the_prompts_pages() {
    let prompt: Vec<u32> = (0..100).map(|i| i * 7 % 60).collect();
    let alone = alone(&[(prompt.clone(), tokens(10))]);
    let plan = Plan::default();
    let engine = engine_of(config(100), &plan);
    let stream = engine.submit(request(prompt, several(&tokens(10), 3)));
    for completion in collect_all(stream.unwrap(), 3) {
        assert_eq!(completion, alone[0]);
    }
    // 6 full pages together, and a seventh each.
    assert_eq!(plan.most_pages.load(Ordering::SeqCst), 9);
    assert_nothing_held(&engine);
    let metrics = engine.metrics();
    let counts = (
        metrics.requests,
        metrics.prompt_tokens,
        metrics.completion_tokens,
    );
    assert_eq!(counts, (1, 100, 30));
}

#[test]
fn completions_are_requests_of_their_own_with_the_seeds_that_follow() {
    // Prompts that end before, at and after a page's end; one token and many.
    let mut requests = requests(8);
    for (i, length) in [1, 15, 16, 17, 32, 33, 64, 90].into_iter().enumerate() {
        requests[i].0 = (0..length).map(|t| (t * 11 + i as u32) % 60).collect();
        requests[i].1.do_sample = true;
        requests[i].1.ignore_eos = i % 2 == 1;
        requests[i].1.seed = Some(u64::MAX - 1);
    }
    requests[0].1.max_tokens = Some(1);
    requests[7].1.max_tokens = Some(1);
    let one = |i: u64| {
        let mut each = requests.clone();
        let seed = (u64::MAX - 1).wrapping_add(i);
        each.iter_mut()
            .for_each(|(_, options)| options.seed = Some(seed));
        alone(&each)
    };
    let alone: Vec<Vec<Delta>> = (0..3).map(one).collect();
    assert_ne!(alone[0][3], alone[1][3]);
    for (pages, token_budget) in [(200, 512), (200, 16), (13, 33), (13, 64)] {
        let plan = Plan::default();
        let config = EngineConfig {
            token_budget,
            ..config(pages)
        };
        let engine = engine_of(config.clone(), &plan);
        let gate = lock(&plan.gate);
        let streams = submit_all(&engine, &requests, 3);
        drop(gate);
        for (r, stream) in streams.into_iter().enumerate() {
            for (i, completion) in collect_all(stream, 3).into_iter().enumerate() {
                assert_eq!(completion, alone[i][r], "completion {i} of {r}, {config:?}");
            }
        }
        assert_nothing_held(&engine);
        assert!(lock(&plan.most).1 <= token_budget);
        assert_eq!(engine.metrics().preemptions > 0, pages == 13, "{config:?}");
    }
}

#[test]
fn leaving_cancels_every_completion() {
    let plan = Plan::default();
    // Room for more than could be decoded before they leave.
    let config = EngineConfig {
        context_size: 20_000,
        ..config(5_000)
    };
    let engine = engine_of(config, &plan);
    let endless = |n| several(&tokens(19_000), n);
    let mut stream = engine.submit(request(vec![5; 40], endless(4))).unwrap();
    while stream.next().unwrap().unwrap().index < 3 {}
    assert_eq!(engine.metrics().running, 4);
    // With 4 these are more than the 8 that run at a time.
    let mut waiting = engine.submit(request(vec![6; 40], endless(5))).unwrap();
    let late = engine.submit(request(vec![7; 40], endless(5))).unwrap();
    assert_eq!(engine.metrics().waiting, 10);
    drop(stream);
    drop(late);
    assert!(waiting.next().unwrap().is_ok());
    waiting.cancel();
    assert_nothing_held(&engine);
    assert!(engine.metrics().completion_tokens < 19_000);
}

#[test]
fn more_completions_than_run_at_a_time_are_refused() {
    let engine = engine(100);
    let error = engine
        .submit(request(vec![1], several(&tokens(1), 9)))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "n must be at most max_sequences 8, got 9"
    );
}

#[test]
fn the_queue_counts_completions() {
    let plan = Plan::default();
    let config = EngineConfig {
        queue_limit: 4,
        ..config(100)
    };
    let engine = engine_of(config, &plan);
    let gate = lock(&plan.gate);
    let submit = |n| engine.submit(request(vec![1], several(&tokens(1), n)));
    let first = submit(8).unwrap();
    wait_until("the first step", || engine.metrics().steps == 1);
    // Alone in the queue, it may be longer than that.
    let second = submit(5).unwrap();
    assert!(matches!(
        submit(1),
        Err(Error::Overloaded {
            waiting: 5,
            limit: 4
        })
    ));
    drop(gate);
    assert_eq!(
        collect_all(first, 8).len() + collect_all(second, 5).len(),
        13
    );
}

#[test]
fn after_a_panic_beside_them_completions_run_again_each_in_pages_of_its_own() {
    let prompt: Vec<u32> = (0..40).collect();
    let alone = alone(&[(prompt.clone(), tokens(100))]);
    let plan = Plan::default();
    let config = EngineConfig {
        token_budget: 64,
        ..config(100)
    };
    let engine = engine_of(config, &plan);
    let gate = lock(&plan.gate);
    let stream = engine
        .submit(request(prompt, several(&tokens(100), 3)))
        .unwrap();
    wait_until("the prompt's step", || engine.metrics().steps == 1);
    std::thread::scope(|scope| {
        let lost = scope.spawn(|| engine.logits(vec![POISON], true, false));
        // Its turn is the next step, where the completions have just begun.
        wait_until("the panic's turn", || engine.metrics().waiting == 1);
        drop(gate);
        assert!(lost.join().unwrap().is_err());
    });
    for completion in collect_all(stream, 3) {
        assert_eq!(completion, alone[0]);
    }
    assert_eq!(plan.built.load(Ordering::SeqCst), 2);
    assert_nothing_held(&engine);
}

#[test]
fn usage_counts_tokens_and_time() {
    let engine = engine(100);
    let stream = engine.submit(request(vec![1, 2, 3], tokens(4))).unwrap();
    let usage = stream.last().unwrap().unwrap().usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 4));
    assert!(usage.time_to_first_token <= usage.total_time);
    let metrics = engine.metrics();
    assert_eq!(
        (
            metrics.requests,
            metrics.prompt_tokens,
            metrics.completion_tokens
        ),
        (1, 3, 4)
    );
}

#[test]
fn a_fork_gets_a_thread_of_its_own_and_lets_the_parents_be() {
    let plan = Plan::default();
    let engine = engine_of(config(100), &plan);
    collect(engine.submit(request(vec![1], tokens(2))).unwrap()).unwrap();
    let here = std::process::id();
    // Held for ever, as by a thread that a fork left behind.
    let held = lock(&engine.generation(here).worker);
    let child = engine.generation(here + 1);
    assert!(child.process == here + 1 && lock(&child.worker).is_none());
    assert!(std::ptr::eq(child, engine.generation(here + 1)));
    drop(held);
}

#[test]
fn an_event_loop_serves_many_streams_without_a_thread_each() {
    let engine = engine(100);
    let notifier = Arc::new(Notifier::new().unwrap());
    let requests = requests(8);
    let alone = alone(&requests);
    let streams: Vec<Stream> = requests
        .iter()
        .map(|(ids, options)| {
            engine
                .submit(request(ids.clone(), options.clone()))
                .unwrap()
        })
        .collect();
    streams
        .iter()
        .enumerate()
        .for_each(|(i, stream)| stream.subscribe(&notifier, i as u64));
    let mut texts = vec![String::new(); streams.len()];
    let start = Instant::now();
    while !streams.iter().all(Stream::ended) {
        assert!(start.elapsed().as_secs() < 20);
        for i in notifier.drain() {
            while let Some(delta) = streams[i as usize].try_recv().unwrap() {
                texts[i as usize] += &delta.text;
            }
        }
    }
    let wanted: Vec<&String> = alone.iter().map(|delta| &delta.text).collect();
    assert_eq!(texts.iter().collect::<Vec<_>>(), wanted);
}

/// Tokens of a prompt that no other test case has.
fn prompt(seed: u32, n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 7 + seed * 13) % 59).collect()
}

#[test]
fn what_has_run_is_kept_for_requests_that_begin_alike() {
    let plan = Plan::default();
    let engine = engine_of(config(100), &plan);
    let begin = prompt(1, 5 * PAGE);
    let run = |end: &[u32]| {
        let ids = [&begin, end].concat();
        let before = plan.rows.load(Ordering::SeqCst);
        let stream = engine.submit(request(ids, tokens(1))).unwrap();
        let answer = collect(stream).unwrap();
        (answer, plan.rows.load(Ordering::SeqCst) - before)
    };
    let (first, rows) = run(&[1, 2, 3]);
    assert_eq!(rows, 5 * PAGE as u64 + 3);
    let (again, rows) = run(&[1, 2, 3]);
    assert_eq!((&again.token_ids, rows), (&first.token_ids, 3));
    let (other, rows) = run(&[3, 2, 1, 4]);
    assert_eq!(rows, 4);
    assert_ne!(other.token_ids, first.token_ids);
    // A whole page's last token runs again: its logits are wanted.
    assert_eq!(run(&[]).1, PAGE as u64);
    let metrics = engine.metrics();
    assert_eq!(metrics.prefix_hit_tokens, 14 * PAGE as u64);
    assert_eq!(metrics.prefix_lookup_tokens, 20 * PAGE as u64 + 10);
    assert_nothing_held(&engine);
    assert_eq!(engine.metrics().pages_cached, 5);

    let without = EngineConfig {
        prefix_cache: false,
        ..config(100)
    };
    let engine = engine_of(without, &plan);
    let ids = [&begin[..], &[1, 2, 3]].concat();
    for _ in 0..2 {
        let stream = engine.submit(request(ids.clone(), tokens(1))).unwrap();
        assert_eq!(collect(stream).unwrap().token_ids, first.token_ids);
    }
    assert_nothing_held(&engine);
    let metrics = engine.metrics();
    assert_eq!((metrics.pages_cached, metrics.prefix_hit_tokens), (0, 0));
}

#[test]
fn an_answer_is_kept_for_the_next_turn() {
    let plan = Plan::default();
    let engine = engine_of(config(100), &plan);
    let mut ids = prompt(2, 20);
    for turn in 0..4 {
        let stream = engine.submit(request(ids.clone(), tokens(30))).unwrap();
        let answer = collect(stream).unwrap();
        let hits = engine.metrics().prefix_hit_tokens as usize;
        let before: usize = (0..turn).map(|t| (20 + 35 * t + 29) / PAGE * PAGE).sum();
        assert!(answer.token_ids.len() < 30 || hits == before, "{hits}");
        ids.extend(answer.token_ids);
        ids.extend(prompt(turn as u32, 5));
    }
    assert_nothing_held(&engine);
}

#[test]
fn requests_that_come_together_wait_for_the_one_that_runs_what_they_begin_with() {
    let plan = Plan::default();
    let engine = engine_of(config(100), &plan);
    let begin = prompt(3, 4 * PAGE);
    let ids = |i: u32| [&begin[..], &[i, i + 1]].concat();
    let requests: Vec<_> = (0..6).map(|i| (ids(i), tokens(4))).collect();
    let alone = alone(&requests);
    let gate = lock(&plan.gate);
    let streams = submit_all(&engine, &requests, 1);
    drop(gate);
    for (stream, alone) in streams.into_iter().zip(&alone) {
        assert_eq!(&collect(stream).unwrap(), alone);
    }
    assert_nothing_held(&engine);
    assert_eq!(engine.metrics().prefix_hit_tokens, 5 * 4 * PAGE as u64);
    let rows = plan.rows.load(Ordering::SeqCst);
    let drafted = engine.metrics().drafted_tokens;
    assert!(rows - drafted <= 4 * PAGE as u64 + 6 * (2 + 4), "{rows}");
    // Four of the beginning, and no request has another whole one.
    assert_eq!(engine.metrics().pages_cached, 4);
}

#[test]
fn a_step_is_left_when_those_have_gone_who_have_most_of_it() {
    let plan = Plan::default();
    let engine = engine_of(config(100), &plan);
    let gate = lock(&plan.gate);
    let left = engine.submit(request(prompt(1, 12), tokens(3))).unwrap();
    wait_until("the first step", || engine.metrics().steps == 1);
    left.cancel();
    drop(gate);
    assert_nothing_held(&engine);
    assert_eq!(plan.rows.load(Ordering::SeqCst), 0);
    assert_eq!(engine.metrics().cancelled, 1);

    // Who has the smaller part goes, and the others are not held up.
    let gate = lock(&plan.gate);
    let small = engine.submit(request(vec![1], tokens(3))).unwrap();
    wait_until("the next step", || engine.metrics().steps == 2);
    let ids = prompt(2, 12);
    let stays = engine.submit(request(ids.clone(), tokens(3))).unwrap();
    small.cancel();
    drop(gate);
    let alone = alone(&[(ids, tokens(3))]);
    assert_eq!(collect(stays).unwrap(), alone[0]);
    assert_nothing_held(&engine);
}

#[test]
fn who_waits_for_another_that_leaves_runs_itself() {
    let plan = Plan::default();
    let engine = engine_of(config(100), &plan);
    let ids = prompt(4, 8 * PAGE);
    let gate = lock(&plan.gate);
    let first = engine.submit(request(ids.clone(), tokens(3))).unwrap();
    wait_until("the first step", || engine.metrics().steps == 1);
    let second = engine.submit(request(ids.clone(), tokens(3))).unwrap();
    first.cancel();
    drop(gate);
    let alone = alone(&[(ids, tokens(3))]);
    assert_eq!(collect(second).unwrap(), alone[0]);
    assert_nothing_held(&engine);
}

#[test]
fn what_is_kept_makes_room_for_who_runs() {
    let engine = engine(12);
    let requests: Vec<_> = (0..20).map(|i| (prompt(i, 60), tokens(20))).collect();
    let alone = alone(&requests);
    for ((ids, options), alone) in requests.iter().zip(&alone) {
        let stream = engine
            .submit(request(ids.clone(), options.clone()))
            .unwrap();
        assert_eq!(&collect(stream).unwrap(), alone);
    }
    assert_nothing_held(&engine);
    let metrics = engine.metrics();
    assert!((1..=12).contains(&metrics.pages_cached));
    assert_eq!(metrics.preemptions, 0);
}

#[test]
fn guesses_change_no_token_and_save_steps() {
    let answers = |speculation: bool, options: &Options| {
        let plan = Plan::default();
        plan.echo.store(9, Ordering::SeqCst);
        // Steps so long that a busy machine's delays are small beside them.
        plan.slow.store(5, Ordering::SeqCst);
        let config = EngineConfig {
            speculation,
            token_budget: 64,
            ..config(100)
        };
        let engine = engine_of(config, &plan);
        let streams: Vec<_> = (0..3)
            .map(|i| {
                engine
                    .submit(request(prompt(i, 30), options.clone()))
                    .unwrap()
            })
            .collect();
        let answers: Vec<_> = streams.into_iter().map(|s| collect(s).unwrap()).collect();
        assert_nothing_held(&engine);
        (answers, engine.metrics())
    };
    let sampled = Options {
        do_sample: true,
        temperature: 8.0,
        logit_bias: vec![(BAD, -100.0), (POISON, -100.0)],
        seed: Some(5),
        ..tokens(100)
    };
    for options in [tokens(100), sampled] {
        let (plain, before) = answers(false, &options);
        let (guessed, after) = answers(true, &options);
        assert_eq!(plain, guessed);
        assert_eq!((before.drafted_tokens, before.accepted_tokens), (0, 0));
        assert!(after.accepted_tokens > 20, "{after:?}");
        assert!(after.accepted_tokens <= after.drafted_tokens);
        assert!(after.steps < before.steps, "{after:?} {before:?}");
    }
}

#[test]
fn the_higher_priority_runs_first() {
    let plan = Plan::default();
    let engine = engine_of(
        EngineConfig {
            max_sequences: 1,
            ..config(100)
        },
        &plan,
    );
    let gate = lock(&plan.gate);
    let begun = engine.submit(request(prompt(0, 5), tokens(2))).unwrap();
    wait_until("the first step", || engine.metrics().steps == 1);
    let submit = |token: u32, priority: i32| {
        let options = Options {
            priority,
            ..tokens(2)
        };
        engine.submit(request(vec![token], options)).unwrap()
    };
    let waiting = [submit(1, -1), submit(2, 0), submit(3, 1), submit(4, 0)];
    drop(gate);
    collect(begun).unwrap();
    for stream in waiting {
        collect(stream).unwrap();
    }
    assert_eq!(*lock(&plan.first), [0, 3, 2, 4, 1]);
    assert_nothing_held(&engine);
}

#[test]
fn who_computes_what_a_more_urgent_one_waits_for_runs_as_soon_as_that() {
    let plan = Plan::default();
    let engine = engine_of(config(200), &plan);
    let gate = lock(&plan.gate);
    let submit = |ids: Vec<u32>, priority: i32| {
        let options = Options {
            priority,
            ..tokens(2)
        };
        engine.submit(request(ids, options)).unwrap()
    };
    let first_token = |stream: Stream| {
        let last = stream.map(Result::unwrap).last().unwrap();
        last.usage.unwrap().time_to_first_token
    };
    let low = submit(prompt(0, 150), -1);
    wait_until("the first step", || engine.metrics().steps == 1);
    let between = [1, 2, 3, 4].map(|token| submit(prompt(token, 150), 0));
    let high = submit([prompt(0, 150), vec![9]].concat(), 1);
    drop(gate);
    let high = first_token(high);
    assert!(between.into_iter().map(first_token).all(|time| high < time));
    collect(low).unwrap();
    assert_nothing_held(&engine);
}

/// A decoder that answers as `Fake` does, but for one token in `wrong`: a good draft model. None: as often as that.
struct Draft {
    fake: Fake,
    wrong: u32,
    rows: Arc<AtomicU64>,
}

impl Forward for Draft {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn forward(&mut self, batch: &Batch, caller: &mut dyn Caller) -> Result<&[f32]> {
        self.rows
            .fetch_add(batch.tokens.len() as u64, Ordering::SeqCst);
        self.fake.forward(batch, caller)?;
        for (row, logits) in batch
            .outputs
            .iter()
            .zip(self.fake.logits.chunks_exact_mut(VOCAB))
        {
            if batch.positions[*row as usize].is_multiple_of(self.wrong) {
                logits[7] = 60.0;
            }
        }
        Ok(&self.fake.logits)
    }
}

fn drafted(engine: Engine, plan: Plan, wrong: u32, rows: &Arc<AtomicU64>) -> Engine {
    let rows = rows.clone();
    let pages = engine.config().pages as usize;
    let factory: Factory = Arc::new(move || {
        let fake = Fake {
            slots: vec![0; pages * PAGE],
            logits: Vec::new(),
            plan: plan.clone(),
        };
        let rows = rows.clone();
        Ok(Box::new(Draft { fake, wrong, rows }) as Box<dyn Forward>)
    });
    engine.with_second(factory, 150)
}

#[test]
fn with_a_draft_model_too_batched_is_alone() {
    let requests = requests(40);
    let alone = alone(&requests);
    for (pages, token_budget) in [(200, 64), (60, 16), (14, 33)] {
        let plan = Plan::default();
        plan.slow.store(3, Ordering::SeqCst);
        let config = EngineConfig {
            token_budget,
            ..config(pages)
        };
        let engine = drafted(
            engine_of(config, &plan),
            Plan::default(),
            4,
            &Arc::default(),
        );
        let streams = submit_all(&engine, &requests, 1);
        for (i, (stream, alone)) in streams.into_iter().zip(&alone).enumerate() {
            assert_eq!(
                &collect(stream).unwrap(),
                alone,
                "request {i}, {pages} pages"
            );
        }
        assert_nothing_held(&engine);
        let metrics = engine.metrics();
        // How many, time decides.
        assert!(metrics.accepted_tokens > 0, "{metrics:?}");
    }
}

#[test]
fn a_draft_model_changes_no_token_and_saves_steps() {
    let sampled = Options {
        do_sample: true,
        temperature: 0.02,
        seed: Some(5),
        ..tokens(60)
    };
    let answers = |wrong: Option<u32>, pages: u32, options: &Options| {
        let plan = Plan::default();
        // Steps of some thousandths of a second, and no text that repeats itself to guess from.
        plan.slow.store(3, Ordering::SeqCst);
        let mut engine = engine_of(config(pages), &plan);
        let rows = Arc::new(AtomicU64::new(0));
        if let Some(wrong) = wrong {
            let plan = Plan::default();
            plan.slow.store(3 * u64::from(wrong == 1), Ordering::SeqCst);
            engine = drafted(engine, plan, wrong, &rows);
        }
        let gate = lock(&plan.gate);
        let prompts = [prompt(1, 70), prompt(1, 90), prompt(2, 30), prompt(1, 33)];
        let requests = prompts.map(|ids| (ids, options.clone()));
        let streams = submit_all(&engine, &requests, 2);
        drop(gate);
        let found: Vec<Vec<Delta>> = streams.into_iter().map(|s| collect_all(s, 2)).collect();
        assert_nothing_held(&engine);
        (found, engine.metrics(), rows.load(Ordering::SeqCst))
    };
    for options in [tokens(60), sampled] {
        let (plain, before, _) = answers(None, 100, &options);
        for (wrong, pages) in [(1000, 100), (5, 100), (5, 26)] {
            let (drafted, after, rows) = answers(Some(wrong), pages, &options);
            assert_eq!(plain, drafted, "{wrong} {pages}");
            assert!(after.accepted_tokens > 0, "{wrong} {pages}: {after:?}");
            // What they share it reads once: 8 x 90 tokens of prompt alone if not.
            assert!(
                pages < 100 || rows < 600 + after.drafted_tokens,
                "{rows} {after:?}"
            );
        }
        // One that is always wrong is soon asked no more.
        let (drafted, after, _) = answers(Some(1), 100, &options);
        assert_eq!(plain, drafted);
        assert!(after.drafted_tokens < 2 * before.completion_tokens);
    }
}

#[test]
fn what_was_saved_need_not_run_again() {
    let path = std::env::temp_dir().join(format!("hfcore-engine-{}", std::process::id()));
    let prompts = [prompt(1, 100), prompt(1, 120), prompt(2, 50)];
    let requests = prompts.map(|ids| (ids, tokens(10)));
    let answers = |engine: &Engine| -> Vec<Delta> {
        let streams = submit_all(engine, &requests, 1);
        streams.into_iter().map(|s| collect(s).unwrap()).collect()
    };
    let first = engine(100);
    let wanted = answers(&first);
    assert_nothing_held(&first);
    let saved = first.save_prefixes(&path, "model").unwrap();
    assert_eq!(saved, first.metrics().pages_cached as usize * PAGE);
    // All of it, twice; and as much as there is room for.
    for (pages, there) in [(100, saved), (10, 10 * PAGE)] {
        let engine = engine(pages);
        for _ in 0..2 {
            assert_eq!(engine.load_prefixes(&path, "model").unwrap(), there);
        }
        assert_eq!(engine.metrics().pages_cached as usize * PAGE, there);
        assert_eq!(answers(&engine), wanted);
        assert!(engine.metrics().prefix_hit_tokens > 0);
        assert_nothing_held(&engine);
    }
    let refused = engine(100).load_prefixes(&path, "other").unwrap_err();
    assert!(refused.to_string().contains("another model"), "{refused}");
    let none = EngineConfig {
        prefix_cache: false,
        ..config(10)
    };
    assert!(
        engine_of(none, &Plan::default())
            .save_prefixes(&path, "model")
            .is_err()
    );
    first.close();
    assert!(matches!(
        first.save_prefixes(&path, "model"),
        Err(Error::Closed)
    ));
    std::fs::remove_file(path).unwrap();
}
