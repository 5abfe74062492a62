//! The engine: `step` plans, runs the model, samples and hands out; a thread of its own does so
//! while there is work. Knows no text and no model, only `Forward` and `Parts`.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::batch::{Forward, PAGE};
use crate::error::{Error, Result};
use crate::options::Options;
use crate::prefix::{Beginning, Path as Prefix, Place};
use crate::saved::Saved;
use crate::sequence::{Parts, Sequence};
use crate::stream::{Sender, Stream, channel, lock};

mod core;
mod second;

use self::core::Core;
use self::second::Drafting;

/// Makes the decoder with its cache, on the engine's thread: at the first request, and again after
/// a panic or in a forked process.
pub type Factory = Arc<dyn Fn() -> Result<Box<dyn Forward>> + Send + Sync>;

/// The sizes of an engine.
///
/// A step never has more than `token_budget` rows, nor asks for the logits of more than
/// `token_budget` rows of them and, where all of a prompt's are wanted, of a fixed number more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Logits per row, as the decoder has them.
    pub vocab_size: usize,
    /// Tokens of prompt and output together, at most. The cache may hold fewer: then those.
    pub context_size: usize,
    /// Cache pages of `PAGE` positions, which the decoder must have.
    pub pages: u32,
    /// Rows per step: how much of a prompt runs at a time.
    pub token_budget: usize,
    /// Requests that run at a time; one for several completions counts as so many.
    pub max_sequences: usize,
    /// Requests that may wait beside those that run, counted likewise.
    pub queue_limit: usize,
    /// Whether what has run is kept for requests that begin alike, as long as no other needs its
    /// pages.
    pub prefix_cache: bool,
    /// Whether the next tokens are guessed from the text so far and looked at together, where that
    /// is faster. It changes no token.
    pub speculation: bool,
}

impl EngineConfig {
    /// 512 rows per step, 64 requests at a time, 1024 waiting.
    pub fn new(vocab_size: usize, context_size: usize, pages: u32) -> Self {
        Self {
            vocab_size,
            context_size,
            pages,
            token_budget: 512,
            max_sequences: 64,
            queue_limit: 1024,
            prefix_cache: true,
            speculation: true,
        }
    }

    fn check(&self) -> Result<()> {
        let at_least = |name: &str, low: usize, got: usize| match got >= low {
            true => Ok(()),
            false => Err(Error::InvalidRequest(format!(
                "{name} must be at least {low}, got {got}"
            ))),
        };
        at_least("vocab_size", 1, self.vocab_size)?;
        at_least("context_size", 2, self.context_size)?;
        at_least("pages", 1, self.pages as usize)?;
        at_least("max_sequences", 1, self.max_sequences)?;
        at_least("token_budget", self.max_sequences, self.token_budget)?;
        at_least("queue_limit", 1, self.queue_limit)
    }

    /// Tokens a request can have: the context, or the cache where that is smaller.
    pub fn context(&self) -> usize {
        self.context_size.min(self.pages as usize * PAGE)
    }

    fn check_ids(&self, what: &str, ids: impl IntoIterator<Item = u32>) -> Result<()> {
        match ids.into_iter().find(|id| *id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => Err(Error::InvalidRequest(format!(
                "{what} must be below the vocabulary's size {}, got {id}",
                self.vocab_size
            ))),
        }
    }

    /// A prompt of 1 to `limit` tokens, all of the vocabulary.
    fn check_prompt(&self, ids: &[u32], limit: usize) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::InvalidRequest(
                "prompt must have at least 1 token, got 0".into(),
            ));
        }
        if ids.len() > limit {
            return Err(Error::ContextOverflow {
                prompt: ids.len(),
                limit: self.context(),
            });
        }
        self.check_ids("a prompt's token ids", ids.iter().copied())
    }
}

/// What to generate from.
pub struct Request {
    /// The prompt.
    pub ids: Vec<u32>,
    pub options: Options,
    /// Makes what turns a completion's tokens into text, once for each completion.
    pub text: Box<dyn Fn() -> Parts + Send>,
    /// See `Span::long`.
    pub long: bool,
    /// The decoder's adapter that it runs with, below 2^16.
    pub adapter: Option<u32>,
    /// The model's end tokens.
    pub eos_ids: Vec<u32>,
}

/// What an engine did so far, and does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Metrics {
    /// Since the start (in this process): requests accepted, their tokens, tokens generated, steps
    /// run, and requests that gave their pages up for an older one.
    pub requests: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub steps: u64,
    pub preemptions: u64,
    /// Now, completions of one request each for itself.
    pub running: u64,
    pub waiting: u64,
    pub pages_used: u64,
    pub pages_total: u64,
    /// Pages of no request, kept for those that begin alike.
    pub pages_cached: u64,
    /// Tokens of requests that were looked for in the cache, and that were found there.
    pub prefix_lookup_tokens: u64,
    pub prefix_hit_tokens: u64,
    /// Tokens that were guessed, and that came true.
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
    /// Requests whose consumer left before their end.
    pub cancelled: u64,
    /// Time in steps.
    pub busy: Duration,
}

/// Runs the requests of many threads together, on one thread of its own.
///
/// The thread starts with the first request and sleeps while there is none. After a fork the child
/// gets a thread, a decoder and a cache of its own at its first request.
pub struct Engine {
    config: EngineConfig,
    factory: Factory,
    /// Of the second model, and how many tokens that can have before it.
    second: Option<(Factory, usize)>,
    closed: AtomicBool,
    first: Arc<Generation>,
}

impl Engine {
    /// # Errors
    /// `InvalidRequest` for sizes no engine can work with.
    pub fn new(factory: Factory, config: EngineConfig) -> Result<Self> {
        config.check()?;
        let first = Arc::new(Generation::new(std::process::id()));
        Ok(Self {
            config,
            factory,
            second: None,
            closed: AtomicBool::new(false),
            first,
        })
    }

    /// The same, with a second, smaller decoder of the same vocabulary and as many pages, which
    /// guesses too; it can have `context` tokens before it.
    pub fn with_second(mut self, factory: Factory, context: usize) -> Self {
        self.second = Some((factory, context));
        self
    }

    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Take a request on; its deltas come through the stream.
    ///
    /// # Errors
    /// `InvalidRequest` for an empty prompt, ids outside the vocabulary or more completions than
    /// run at a time, `ContextOverflow` when the prompt leaves no room for a token, `Overloaded`
    /// when the queue is full, `Closed`.
    pub fn submit(&self, request: Request) -> Result<Stream> {
        let config = &self.config;
        let Request {
            ids,
            options,
            text,
            long,
            adapter,
            eos_ids,
        } = request;
        let begins = Beginning { long, adapter };
        config.check_prompt(&ids, config.context() - 1)?;
        config.check_ids("logit_bias", options.logit_bias.iter().map(|(id, _)| *id))?;
        config.check_ids("stop_token_ids", options.stop_token_ids.iter().copied())?;

        if options.n > config.max_sequences {
            return Err(Error::InvalidRequest(format!(
                "n must be at most max_sequences {}, got {}",
                config.max_sequences, options.n
            )));
        }

        let prompt_tokens = ids.len() as u64;
        let (sender, stream) = channel();
        let task = |index: usize, sender: Sender| {
            let options = Options {
                seed: options.seed.map(|seed| seed.wrapping_add(index as u64)),
                prompt_logprobs: options.prompt_logprobs && index == 0,
                ..options.clone()
            };
            Task {
                id: 0,
                sequence: Sequence::new(ids.clone(), &options, &eos_ids, text(), config.context())
                    .guessing(config.speculation),
                table: Vec::new(),
                followers: Vec::new(),
                sender,
                begins,
                timeout: options.timeout,
                priority: options.priority,
                path: None,
                waits_for: None,
                drafting: Drafting::default(),
            }
        };
        let followers = (1..options.n).map(|index| task(index, sender.beside(index)));
        let task = Task {
            followers: followers.collect(),
            ..task(0, sender)
        };
        let counters = self.send(Work::Generate(Box::new(task)))?;
        counters.requests.fetch_add(1, Ordering::Relaxed);
        counters
            .prompt_tokens
            .fetch_add(prompt_tokens, Ordering::Relaxed);
        Ok(stream)
    }

    /// The logits after each of `ids`, `[ids, vocab_size]`, or after the last alone,
    /// `[vocab_size]`. Waits for its turn among the requests; none runs meanwhile.
    ///
    /// # Errors
    /// As `submit`, and what the decoder raises.
    pub fn logits(
        &self,
        ids: Vec<u32>,
        last_only: bool,
        begins: impl Into<Beginning>,
    ) -> Result<Vec<f32>> {
        self.config.check_prompt(&ids, self.config.context())?;
        let (answer, result) = mpsc::channel();
        self.send(Work::Logits(LogitsJob {
            ids,
            last_only,
            begins: begins.into(),
            answer,
        }))?;
        result.recv().unwrap_or(Err(Error::Closed))
    }

    /// Write what the cache holds of texts that have run to a file, for [`Self::load_prefixes`]; how many tokens that is.
    /// `model` names whose keys and values they are.
    ///
    /// # Errors
    /// `InvalidRequest` where nothing is kept, `ModelFile` where the file cannot be written, `Closed`.
    pub fn save_prefixes(&self, path: &Path, model: &str) -> Result<usize> {
        let saved = self.now(Core::save)?;
        saved.write(path, model)?;
        Ok(saved.pages.len() * PAGE)
    }

    /// Take what was saved of the same `model` into the cache, as far as there is room; how many of its tokens are there.
    ///
    /// # Errors
    /// As [`Self::save_prefixes`], and `ModelFile` for a file that is no such, or another model's.
    pub fn load_prefixes(&self, path: &Path, model: &str) -> Result<usize> {
        let page_bytes = self.now(Core::page_bytes)?;
        let saved = Saved::read(path, model, page_bytes)?;
        let outside = saved.pages.iter().flat_map(|page| page.tokens);
        self.config.check_ids("saved tokens", outside)?;
        self.now(move |core| core.restore(&saved))
    }

    /// Do something between two steps.
    fn now<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Core) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, result) = mpsc::channel();
        let job = move |core: &mut Core| {
            // Who asked may have gone.
            let _ = answer.send(core.guarded(job));
        };
        self.send(Work::Now(Box::new(job)))?;
        result.recv().unwrap_or(Err(Error::Closed))
    }

    pub fn metrics(&self) -> Metrics {
        let generation = self.generation(std::process::id());
        let waiting = lock(&generation.worker)
            .as_ref()
            .map_or(0, |worker| worker.inbox.waiting());
        let counters = &generation.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Metrics {
            requests: read(&counters.requests),
            prompt_tokens: read(&counters.prompt_tokens),
            completion_tokens: read(&counters.completion_tokens),
            steps: read(&counters.steps),
            preemptions: read(&counters.preemptions),
            running: read(&counters.running),
            waiting: waiting as u64,
            pages_used: read(&counters.pages_used),
            pages_total: u64::from(self.config.pages),
            pages_cached: read(&counters.pages_cached),
            prefix_lookup_tokens: read(&counters.prefix_lookup_tokens),
            prefix_hit_tokens: read(&counters.prefix_hit_tokens),
            drafted_tokens: read(&counters.drafted_tokens),
            accepted_tokens: read(&counters.accepted_tokens),
            cancelled: read(&counters.cancelled),
            busy: Duration::from_micros(read(&counters.busy_micros)),
        }
    }

    /// End all requests with `Closed` and the thread with them; waits for the step under way.
    pub fn close(&self) {
        let worker = {
            let mut worker = lock(&self.generation(std::process::id()).worker);
            self.closed.store(true, Ordering::Relaxed);
            worker.take()
        };
        if let Some(worker) = worker {
            worker.inbox.close();
            // An `Err` would be the thread's own panic: its requests were told already.
            let _ = worker.thread.join();
        }
    }

    /// Queue work for this process's thread, starting that if need be.
    fn send(&self, work: Work) -> Result<Arc<Counters>> {
        let generation = self.generation(std::process::id());
        let mut worker = lock(&generation.worker);
        if self.closed.load(Ordering::Relaxed) {
            return Err(Error::Closed);
        }
        if worker
            .as_ref()
            .is_none_or(|worker| worker.thread.is_finished())
        {
            *worker = Some(self.start(&generation.counters)?);
        }
        let Some(worker) = &*worker else {
            return Err(Error::Closed);
        };
        worker.inbox.put(work, self.config.queue_limit)?;
        Ok(generation.counters.clone())
    }

    fn start(&self, counters: &Arc<Counters>) -> Result<Worker> {
        let inbox = Arc::new(Inbox::new(counters.clone()));
        let decoders = (self.factory.clone(), self.second.clone());
        let core = Core::new(self.config.clone(), decoders, counters.clone());
        let mail = inbox.clone();
        let thread = std::thread::Builder::new()
            .name("hfcore-engine".into())
            .spawn(move || serve(&mail, core))
            .map_err(|error| {
                Error::Internal(format!("cannot start the engine's thread: {error}"))
            })?;
        Ok(Worker { inbox, thread })
    }

    /// The state of a process. A fork's child finds only its ancestors' and adds its own: theirs
    /// may be locked by a thread that does not exist any more.
    fn generation(&self, process: u32) -> &Generation {
        let mut generation = &self.first;
        while generation.process != process {
            generation = generation
                .next
                .get_or_init(|| Arc::new(Generation::new(process)));
        }
        generation
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
        // What belongs to another process must not be dropped here: its thread's handle names a
        // thread of that process, and detaching it would hit whichever has its place in this one.
        let mut generation = Some(&self.first);
        while let Some(this) = generation {
            if this.process != std::process::id() {
                std::mem::forget(this.clone());
            }
            generation = this.next.get();
        }
    }
}

/// What one process has of an engine.
struct Generation {
    process: u32,
    worker: Mutex<Option<Worker>>,
    counters: Arc<Counters>,
    /// A child's, made there.
    next: OnceLock<Arc<Generation>>,
}

impl Generation {
    fn new(process: u32) -> Self {
        Self {
            process,
            worker: Mutex::new(None),
            counters: Arc::default(),
            next: OnceLock::new(),
        }
    }
}

struct Worker {
    inbox: Arc<Inbox>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    steps: AtomicU64,
    preemptions: AtomicU64,
    running: AtomicU64,
    /// Taken by the thread, and not running yet.
    waiting: AtomicU64,
    pages_used: AtomicU64,
    pages_cached: AtomicU64,
    prefix_lookup_tokens: AtomicU64,
    prefix_hit_tokens: AtomicU64,
    drafted_tokens: AtomicU64,
    accepted_tokens: AtomicU64,
    cancelled: AtomicU64,
    busy_micros: AtomicU64,
}

/// What the thread is asked to do.
enum Work {
    Generate(Box<Task>),
    Logits(LogitsJob),
    /// Between two steps, before what waits.
    Now(Box<dyn FnOnce(&mut Core) + Send>),
}

impl Work {
    /// How many of `max_sequences`, or of `queue_limit`, it takes.
    fn places(&self) -> usize {
        match self {
            Self::Generate(task) => task.places(),
            Self::Logits(_) => 1,
            Self::Now(_) => 0,
        }
    }
}

/// A completion on the engine's side.
struct Task {
    id: u64,
    sequence: Sequence,
    /// Its cache pages; none while it waits.
    table: Vec<u32>,
    /// The request's other completions, until the prompt has run: then they start with its pages.
    followers: Vec<Task>,
    sender: Sender,
    begins: Beginning,
    timeout: Option<Duration>,
    priority: i32,
    /// Where it stands among the prefixes; none while it waits.
    path: Option<Prefix>,
    /// What another request is computing that it can use.
    waits_for: Option<Place>,
    /// What the second model has done for it.
    drafting: Drafting,
}

impl Task {
    /// Itself and those that will run beside it.
    fn places(&self) -> usize {
        1 + self.followers.len()
    }
}

struct LogitsJob {
    ids: Vec<u32>,
    last_only: bool,
    begins: Beginning,
    answer: mpsc::Sender<Result<Vec<f32>>>,
}

struct Inbox {
    mail: Mutex<Mail>,
    changed: Condvar,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Mail {
    work: Vec<Work>,
    closed: bool,
}

impl Inbox {
    fn new(counters: Arc<Counters>) -> Self {
        Self {
            mail: Mutex::default(),
            changed: Condvar::new(),
            counters,
        }
    }

    fn put(&self, work: Work, limit: usize) -> Result<()> {
        let mut mail = lock(&self.mail);
        if mail.closed {
            return Err(Error::Closed);
        }
        let waiting = self.all_waiting(&mail);
        // An empty queue takes any request.
        if waiting > 0 && waiting + work.places() > limit {
            return Err(Error::Overloaded { waiting, limit });
        }
        mail.work.push(work);
        self.changed.notify_one();
        Ok(())
    }

    /// The new work; sleeps until there is some if `idle`. None: closed.
    fn take(&self, idle: bool) -> Option<Vec<Work>> {
        let mut mail = lock(&self.mail);
        while idle && mail.work.is_empty() && !mail.closed {
            mail = self
                .changed
                .wait(mail)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if mail.closed {
            return None;
        }
        let taken = places(&mail.work) as u64;
        self.counters.waiting.fetch_add(taken, Ordering::Relaxed);
        Some(std::mem::take(&mut mail.work))
    }

    fn waiting(&self) -> usize {
        self.all_waiting(&lock(&self.mail))
    }

    fn all_waiting(&self, mail: &Mail) -> usize {
        places(&mail.work) + self.counters.waiting.load(Ordering::Relaxed) as usize
    }

    /// Take no more, and let what is left go: its consumers get `Closed`.
    fn close(&self) {
        let mut mail = lock(&self.mail);
        mail.closed = true;
        let left = std::mem::take(&mut mail.work);
        self.changed.notify_one();
        drop(mail);
        drop(left);
    }
}

impl Work {
    fn priority(&self) -> i32 {
        match self {
            Self::Generate(task) => task.priority,
            Self::Logits(_) | Self::Now(_) => 0,
        }
    }
}

fn places<'a>(work: impl IntoIterator<Item = &'a Work>) -> usize {
    work.into_iter().map(Work::places).sum()
}

/// The thread: step while there is work, sleep while there is none.
fn serve(inbox: &Inbox, mut core: Core) {
    /// However the thread ends, nobody waits for it.
    struct Ending<'a>(&'a Inbox);
    impl Drop for Ending<'_> {
        fn drop(&mut self) {
            self.0.close();
        }
    }
    let _ending = Ending(inbox);
    while let Some(work) = inbox.take(core.idle()) {
        work.into_iter().for_each(|work| core.queue(work));
        core.step();
    }
    core.fail_everything(&Error::Closed);
}

#[cfg(test)]
mod tests;
