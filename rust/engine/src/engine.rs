//! The engine: `step` plans, runs the model, samples and hands out; a thread of its own does so
//! while there is work. Knows no text and no model, only `Forward` and `Text`.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::batch::{Batch, Forward, PAGE};
use crate::error::{Error, Result};
use crate::options::Options;
use crate::pages::Pages;
use crate::scheduler::{self, Job};
use crate::sequence::{Sequence, Text};
use crate::stream::{Sender, Stream, channel, lock};

/// Makes the decoder with its cache, on the engine's thread: at the first request, and again after
/// a panic or in a forked process.
pub type Factory = Arc<dyn Fn() -> Result<Box<dyn Forward>> + Send + Sync>;

/// The sizes of an engine.
///
/// A step never has more than `token_budget` rows, nor asks for the logits of more than
/// `max_sequences` of them.
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
    /// Requests that run at a time.
    pub max_sequences: usize,
    /// Requests that may wait beside those that run.
    pub queue_limit: usize,
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
    /// Turns its tokens into text.
    pub text: Box<dyn Text>,
    /// See `Span::long`.
    pub long: bool,
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
    /// Now.
    pub running: u64,
    pub waiting: u64,
    pub pages_used: u64,
    pub pages_total: u64,
}

/// Runs the requests of many threads together, on one thread of its own.
///
/// The thread starts with the first request and sleeps while there is none. After a fork the child
/// gets a thread, a decoder and a cache of its own at its first request.
pub struct Engine {
    config: EngineConfig,
    factory: Factory,
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
            closed: AtomicBool::new(false),
            first,
        })
    }

    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Take a request on; its deltas come through the stream.
    ///
    /// # Errors
    /// `InvalidRequest` for an empty prompt or ids outside the vocabulary, `ContextOverflow` when
    /// the prompt leaves no room for a token, `Overloaded` when the queue is full, `Closed`.
    pub fn submit(&self, request: Request) -> Result<Stream> {
        let config = &self.config;
        let Request {
            ids,
            options,
            text,
            long,
            eos_ids,
        } = request;
        config.check_prompt(&ids, config.context() - 1)?;
        config.check_ids("logit_bias", options.logit_bias.iter().map(|(id, _)| *id))?;
        config.check_ids("stop_token_ids", options.stop_token_ids.iter().copied())?;

        let prompt_tokens = ids.len() as u64;
        let sequence = Sequence::new(ids, &options, &eos_ids, text, config.context());
        let (sender, stream) = channel();
        let task = Task {
            id: 0,
            sequence,
            table: Vec::new(),
            sender,
            long,
            timeout: options.timeout,
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
    pub fn logits(&self, ids: Vec<u32>, last_only: bool, long: bool) -> Result<Vec<f32>> {
        self.config.check_prompt(&ids, self.config.context())?;
        let (answer, result) = mpsc::channel();
        self.send(Work::Logits(LogitsJob {
            ids,
            last_only,
            long,
            answer,
        }))?;
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
        let core = Core::new(self.config.clone(), self.factory.clone(), counters.clone());
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
}

/// What the thread is asked to do.
enum Work {
    Generate(Box<Task>),
    Logits(LogitsJob),
}

/// A request on the engine's side.
struct Task {
    id: u64,
    sequence: Sequence,
    /// Its cache pages; none while it waits.
    table: Vec<u32>,
    sender: Sender,
    long: bool,
    timeout: Option<Duration>,
}

struct LogitsJob {
    ids: Vec<u32>,
    last_only: bool,
    long: bool,
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
        if waiting >= limit {
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
        let taken = mail.work.len() as u64;
        self.counters.waiting.fetch_add(taken, Ordering::Relaxed);
        Some(std::mem::take(&mut mail.work))
    }

    fn waiting(&self) -> usize {
        self.all_waiting(&lock(&self.mail))
    }

    fn all_waiting(&self, mail: &Mail) -> usize {
        mail.work.len() + self.counters.waiting.load(Ordering::Relaxed) as usize
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
        core.waiting.extend(work);
        core.step();
    }
    core.fail_everything(&Error::Closed);
}

/// The engine without its thread.
struct Core {
    config: EngineConfig,
    factory: Factory,
    /// None before the first request, and after a panic.
    forward: Option<Box<dyn Forward>>,
    pages: Pages,
    /// In order of arrival, and all younger than those that run.
    waiting: VecDeque<Work>,
    /// In order of arrival.
    running: Vec<Task>,
    batch: Batch,
    next_id: u64,
    counters: Arc<Counters>,
}

impl Core {
    fn new(config: EngineConfig, factory: Factory, counters: Arc<Counters>) -> Self {
        Self {
            pages: Pages::new(config.pages),
            config,
            factory,
            forward: None,
            waiting: VecDeque::new(),
            running: Vec::new(),
            batch: Batch::default(),
            next_id: 0,
            counters,
        }
    }

    fn idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// One round: who may run, what runs, what came of it.
    fn step(&mut self) {
        self.expire();
        self.retire();
        if self.idle() {
            return;
        }
        if let Err(error) = self.make_forward() {
            self.fail_everything(&error);
            return;
        }
        self.make_room();
        self.admit();
        self.publish();
        let plan = scheduler::plan(&self.jobs(), self.config.token_budget);
        if let Err(error) = self.guarded(|core| core.run(&plan)) {
            self.fail(&plan, &error);
        }
        self.retire();
    }

    fn make_forward(&mut self) -> Result<()> {
        if self.forward.is_some() {
            return Ok(());
        }
        let factory = self.factory.clone();
        let forward = self.guarded(|_| factory())?;
        let (wanted, got) = (self.config.vocab_size, forward.vocab_size());
        if wanted != got {
            let message = format!("the decoder must have {wanted} logits per row, it has {got}");
            return Err(Error::Internal(message));
        }
        self.forward = Some(forward);
        Ok(())
    }

    /// Give every running request the pages its next step writes to; where none are free the
    /// youngest gives up its own and waits again. The oldest fits alone: see `context`.
    fn make_room(&mut self) {
        let mut i = 0;
        while let Some(task) = self.running.get_mut(i) {
            if self
                .pages
                .grow(&mut task.table, task.sequence.len().div_ceil(PAGE))
            {
                i += 1;
                continue;
            }
            let Some(mut youngest) = self.running.pop() else {
                return;
            };
            self.pages.release(&mut youngest.table);
            youngest.sequence.forget_cache();
            self.waiting.push_front(Work::Generate(Box::new(youngest)));
            self.counters.preemptions.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Let waiting work run, first come first served, while there are places and pages.
    fn admit(&mut self) {
        while self.running.len() < self.config.max_sequences {
            let tokens = match self.waiting.front() {
                None => return,
                Some(Work::Generate(task)) => task.sequence.len(),
                Some(Work::Logits(job)) => job.ids.len(),
            };
            let mut table = Vec::new();
            if !self.pages.grow(&mut table, tokens.div_ceil(PAGE)) {
                return;
            }
            match self.waiting.pop_front() {
                Some(Work::Generate(task)) => {
                    self.next_id += 1;
                    self.running.push(Task {
                        id: self.next_id,
                        table,
                        ..*task
                    });
                }
                Some(Work::Logits(job)) => {
                    let logits = self.guarded(|core| core.logits(&job, &table));
                    // Who asked may have gone.
                    let _ = job.answer.send(logits);
                    self.pages.release(&mut table);
                }
                None => self.pages.release(&mut table),
            }
        }
    }

    fn jobs(&self) -> Vec<Job> {
        let prompt_left = |sequence: &Sequence| match sequence.decoding() {
            true => 0,
            false => sequence.pending(),
        };
        let job = |task: &Task| Job {
            id: task.id,
            prompt_left: prompt_left(&task.sequence),
        };
        self.running.iter().map(job).collect()
    }

    /// Run the model over the planned tokens, and take each sequence on that reached its end.
    fn run(&mut self, plan: &[(u64, usize)]) -> Result<()> {
        // Lost to a panic in `admit`: the next step makes a new one.
        let Some(forward) = &mut self.forward else {
            return Ok(());
        };
        self.batch.clear();
        for &(id, tokens) in plan {
            let Some(task) = self.running.iter().find(|task| task.id == id) else {
                continue;
            };
            let (ids, start) = task.sequence.next(tokens);
            self.batch.push(ids, start, &task.table, task.long);
            if tokens == task.sequence.pending() {
                self.batch.outputs.push(self.batch.tokens.len() as u32 - 1);
            }
        }
        self.counters.steps.fetch_add(1, Ordering::Relaxed);
        let logits = forward.forward(&self.batch)?;
        check_logits(logits, &self.batch, self.config.vocab_size)?;
        let mut rows = logits.chunks_exact(self.config.vocab_size);
        for &(id, tokens) in plan {
            let Some(task) = self.running.iter_mut().find(|task| task.id == id) else {
                continue;
            };
            task.sequence.ran(tokens);
            if task.sequence.pending() > 0 {
                continue;
            }
            if let Some(row) = rows.next() {
                let delta = task.sequence.advance(row);
                self.counters
                    .completion_tokens
                    .fetch_add(1, Ordering::Relaxed);
                task.sender.send(delta);
            }
        }
        Ok(())
    }

    /// Run a prompt for its logits alone, in chunks.
    fn logits(&mut self, job: &LogitsJob, table: &[u32]) -> Result<Vec<f32>> {
        let lost = || Error::Internal("the decoder was lost in the same step".into());
        let forward = self.forward.as_mut().ok_or_else(lost)?;
        // All logits of a chunk are wanted: no more of them than a decoding step has.
        let chunk = match job.last_only {
            true => self.config.token_budget,
            false => self.config.max_sequences,
        };
        let mut logits = Vec::new();
        let mut start = 0;
        for ids in job.ids.chunks(chunk) {
            let rows = ids.len() as u32;
            self.batch.clear();
            self.batch.push(ids, start, table, job.long);
            start += ids.len();
            if !job.last_only {
                self.batch.outputs.extend(0..rows);
            } else if start == job.ids.len() {
                self.batch.outputs.push(rows - 1);
            }
            self.counters.steps.fetch_add(1, Ordering::Relaxed);
            let chunk = forward.forward(&self.batch)?;
            check_logits(chunk, &self.batch, self.config.vocab_size)?;
            logits.extend_from_slice(chunk);
        }
        Ok(logits)
    }

    /// Do something that runs code which might panic. After a panic the decoder is not to be
    /// trusted: it goes, its cache with it, and the requests that remain run again from their
    /// first token on a new one.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let panic = match catch_unwind(AssertUnwindSafe(|| work(self))) {
            Ok(result) => return result,
            Err(panic) => panic,
        };
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let broken = self.forward.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(broken)));
        self.running
            .iter_mut()
            .for_each(|task| task.sequence.forget_cache());
        Err(Error::Internal(
            text.unwrap_or_else(|| "a panic without a message".into()),
        ))
    }

    /// End the requests of a failed step.
    fn fail(&mut self, plan: &[(u64, usize)], error: &Error) {
        for task in &mut self.running {
            if plan.iter().any(|(id, _)| *id == task.id) {
                task.sender.send(Err(error.clone()));
            }
        }
    }

    /// End all there is.
    fn fail_everything(&mut self, error: &Error) {
        for task in &mut self.running {
            task.sender.send(Err(error.clone()));
        }
        for work in self.waiting.drain(..) {
            match work {
                Work::Generate(mut task) => task.sender.send(Err(error.clone())),
                Work::Logits(job) => {
                    let _ = job.answer.send(Err(error.clone()));
                }
            }
        }
        self.retire();
    }

    /// End the requests whose time is up.
    fn expire(&mut self) {
        let now = Instant::now();
        let waiting = self.waiting.iter_mut().filter_map(|work| match work {
            Work::Generate(task) => Some(task.as_mut()),
            Work::Logits(_) => None,
        });
        for task in self.running.iter_mut().chain(waiting) {
            let Some(timeout) = task.timeout else {
                continue;
            };
            if now - task.sequence.submitted() >= timeout {
                task.sender.send(Err(Error::Timeout {
                    seconds: timeout.as_secs_f64(),
                }));
            }
        }
    }

    /// Let go of requests that have ended or whose consumer left, and take their pages back.
    fn retire(&mut self) {
        let pages = &mut self.pages;
        self.running.retain_mut(|task| {
            // Asked once: a consumer may leave at any moment.
            let over = task.sender.over();
            if over {
                pages.release(&mut task.table);
            }
            !over
        });
        self.waiting.retain(|work| match work {
            Work::Generate(task) => !task.sender.over(),
            Work::Logits(_) => true,
        });
        self.publish();
    }

    fn publish(&self) {
        let set = |gauge: &AtomicU64, n: usize| gauge.store(n as u64, Ordering::Relaxed);
        set(&self.counters.running, self.running.len());
        set(&self.counters.waiting, self.waiting.len());
        set(&self.counters.pages_used, self.pages.used());
    }
}

/// A decoder that returned another number of logits than asked would shift one request's onto the
/// next.
fn check_logits(logits: &[f32], batch: &Batch, vocab_size: usize) -> Result<()> {
    let wanted = batch.outputs.len() * vocab_size;
    match logits.len() == wanted {
        true => Ok(()),
        false => {
            let message = format!(
                "the decoder must return {wanted} logits, it returned {}",
                logits.len()
            );
            Err(Error::Internal(message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
    }

    impl Forward for Fake {
        fn vocab_size(&self) -> usize {
            VOCAB
        }

        fn forward(&mut self, batch: &Batch) -> Result<&[f32]> {
            drop(lock(&self.plan.gate));
            {
                let mut most = lock(&self.plan.most);
                *most = (
                    most.0.max(batch.tokens.len()),
                    most.1.max(batch.outputs.len()),
                );
            }
            self.logits.clear();
            for span in &batch.spans {
                let pages = &batch.pages[span.first_page..span.first_page + span.pages];
                let slot =
                    |position: usize| pages[position / PAGE] as usize * PAGE + position % PAGE;
                for row in span.first_row..span.first_row + span.rows {
                    assert_ne!(batch.tokens[row], POISON, "poison");
                    if batch.tokens[row] == BAD {
                        return Err(Error::OutOfMemory {
                            needed: 2,
                            available: 1,
                        });
                    }
                    let position = batch.positions[row] as usize;
                    self.slots[slot(position)] = batch.tokens[row];
                    if batch.outputs.contains(&(row as u32)) {
                        let history = (0..=position).map(|p| self.slots[slot(p)]);
                        push_logits(history, &mut self.logits);
                    }
                }
            }
            Ok(&self.logits)
        }
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
            text: Box::new(Letters),
            long: false,
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
            assert_eq!(delta.token_ids.len(), 1);
            whole.text += &delta.text;
            whole.token_ids.extend(delta.token_ids);
            whole.logprobs.extend(delta.logprobs);
            whole.finish_reason = delta.finish_reason;
            assert_eq!(delta.usage.is_some(), delta.finish_reason.is_some());
        }
        Ok(whole)
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
            let streams: Vec<Stream> = requests
                .iter()
                .map(|(ids, options)| {
                    engine
                        .submit(request(ids.clone(), options.clone()))
                        .unwrap()
                })
                .collect();
            drop(gate);
            for (i, (stream, alone)) in streams.into_iter().zip(&alone).enumerate() {
                assert_eq!(&collect(stream).unwrap(), alone, "request {i}, {config:?}");
            }
            assert_nothing_held(&engine);
            let (rows, outputs) = *lock(&plan.most);
            assert!(rows <= token_budget && outputs <= config.max_sequences);
            assert!(outputs > 1, "nothing ran together");
            assert_eq!(engine.metrics().preemptions > 0, pages == 13, "{config:?}");
        }
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
        // 20 tokens do not fit beside it into the step, so this one is spared but for its start.
        let beside = engine.submit(request(vec![3; 30], tokens(5))).unwrap();
        let spared = engine
            .submit(request(requests[0].0.clone(), requests[0].1.clone()))
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
}
