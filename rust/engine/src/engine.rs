//! The engine: `step` plans, runs the model, samples and hands out; a thread of its own does so
//! while there is work. Knows no text and no model, only `Forward` and `Parts`.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::batch::{Allowed, Batch, Forward, PAGE};
use crate::constraint::Aside;
use crate::error::{Error, Result};
use crate::options::Options;
use crate::pages::Pages;
use crate::scheduler::{self, Job};
use crate::sequence::{Parts, Sequence};
use crate::stream::{Sender, Stream, channel, lock};

/// Rows whose logits are made at a time where those of every position are wanted: a large vocabulary
/// makes a megabyte of each.
const LOGIT_ROWS: usize = 64;

/// Makes the decoder with its cache, on the engine's thread: at the first request, and again after
/// a panic or in a forked process.
pub type Factory = Arc<dyn Fn() -> Result<Box<dyn Forward>> + Send + Sync>;

/// The sizes of an engine.
///
/// A step never has more than `token_budget` rows, nor asks for the logits of more than
/// `max_sequences` of them and, where all of a prompt's are wanted, of `LOGIT_ROWS` more.
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
    /// Makes what turns a completion's tokens into text, once for each completion.
    pub text: Box<dyn Fn() -> Parts + Send>,
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
    /// Now, completions of one request each for itself.
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
            eos_ids,
        } = request;
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
                sequence: Sequence::new(ids.clone(), &options, &eos_ids, text(), config.context()),
                table: Vec::new(),
                followers: Vec::new(),
                sender,
                long,
                timeout: options.timeout,
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

impl Work {
    /// How many of `max_sequences`, or of `queue_limit`, it takes.
    fn places(&self) -> usize {
        match self {
            Self::Generate(task) => task.places(),
            Self::Logits(_) => 1,
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
    long: bool,
    timeout: Option<Duration>,
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
    /// Which of `running` chooses a token by each output of the batch, if one does.
    choosers: Vec<Option<usize>>,
    /// Makes the grammars' masks while the model runs.
    aside: Aside,
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
            choosers: Vec::new(),
            aside: Aside::default(),
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
        if plan.is_empty() {
            return;
        }
        match self.guarded(|core| core.run(&plan)) {
            Ok(()) => self.start_followers(),
            Err(error) => self.fail(&plan, &error),
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
        while let Some(work) = self.waiting.front() {
            if self.running_places() + work.places() > self.config.max_sequences {
                return;
            }
            let tokens = match work {
                Work::Generate(task) => task.sequence.len(),
                Work::Logits(job) => job.ids.len(),
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

    fn running_places(&self) -> usize {
        self.running.iter().map(Task::places).sum()
    }

    /// Where a prompt has run, let its request's other completions run beside the first. They own
    /// its full pages together, which nobody writes to again, and start after these: at the
    /// prompt's last token at the latest, whose logits each needs.
    fn start_followers(&mut self) {
        let mut i = 0;
        while let Some(leader) = self.running.get_mut(i) {
            i += 1;
            if leader.sequence.completion_tokens() == 0 || leader.followers.is_empty() {
                continue;
            }
            let full = (leader.sequence.prompt_tokens() - 1) / PAGE;
            let shared: Vec<u32> = leader.table.iter().copied().take(full).collect();
            let mut followers = std::mem::take(&mut leader.followers);
            for task in &mut followers {
                self.next_id += 1;
                task.id = self.next_id;
                self.pages.retain(&shared);
                task.table.clone_from(&shared);
                task.sequence.ran(shared.len() * PAGE);
            }
            self.running.splice(i..i, followers);
        }
    }

    /// What there is to run. Prompts whose logits are all wanted share `LOGIT_ROWS` of a step; those
    /// for which none is left wait.
    fn jobs(&self) -> Vec<Job> {
        let mut logit_rows = LOGIT_ROWS;
        let job = |task: &Task| {
            let sequence = &task.sequence;
            let mut prompt_left = match sequence.decoding() {
                true => 0,
                false => sequence.pending(),
            };
            if sequence.wants_all_logits() {
                prompt_left = prompt_left.min(logit_rows);
                logit_rows -= prompt_left;
                if prompt_left == 0 {
                    return None;
                }
            }
            let id = task.id;
            Some(Job { id, prompt_left })
        };
        self.running.iter().filter_map(job).collect()
    }

    /// Run the model over the planned tokens, and take each sequence on that reached its end.
    fn run(&mut self, plan: &[(u64, usize)]) -> Result<()> {
        // Lost to a panic in `admit`: the next step makes a new one.
        let Some(forward) = &mut self.forward else {
            return Ok(());
        };
        self.batch.clear();
        self.choosers.clear();
        for &(id, tokens) in plan {
            let Some(place) = self.running.iter().position(|task| task.id == id) else {
                continue;
            };
            let task = &mut self.running[place];
            task.sequence.prepare(tokens, &mut self.aside);
            let (ids, start) = task.sequence.next(tokens);
            self.batch.push(ids, start, &task.table, task.long);
            let end = self.batch.tokens.len() as u32;
            let wanted = task.sequence.rows_wanted(tokens) as u32;
            self.batch.outputs.extend(end - wanted..end);
            self.choosers.resize(self.batch.outputs.len(), None);
            if tokens == task.sequence.pending()
                && let Some(last) = self.choosers.last_mut()
            {
                *last = Some(place);
            }
        }
        self.counters.steps.fetch_add(1, Ordering::Relaxed);
        let mut masks = Masks {
            tasks: &mut self.running,
            choosers: &self.choosers,
        };
        let logits = forward.forward(&self.batch, &mut masks)?;
        check_logits(logits, &self.batch, self.config.vocab_size)?;
        let mut rows = logits.chunks_exact(self.config.vocab_size);
        for &(id, tokens) in plan {
            let Some(task) = self.running.iter_mut().find(|task| task.id == id) else {
                continue;
            };
            let wanted = task.sequence.rows_wanted(tokens);
            task.sequence.ran(tokens);
            for row in rows.by_ref().take(wanted) {
                let Some(delta) = task.sequence.take(row).transpose() else {
                    continue;
                };
                let tokens = delta.as_ref().map_or(0, |delta| delta.token_ids.len());
                self.counters
                    .completion_tokens
                    .fetch_add(tokens as u64, Ordering::Relaxed);
                task.sender.send(delta);
            }
        }
        Ok(())
    }

    /// Run a prompt for its logits alone, in chunks.
    fn logits(&mut self, job: &LogitsJob, table: &[u32]) -> Result<Vec<f32>> {
        let lost = || Error::Internal("the decoder was lost in the same step".into());
        let forward = self.forward.as_mut().ok_or_else(lost)?;
        let chunk = match job.last_only {
            true => self.config.token_budget,
            false => LOGIT_ROWS.min(self.config.token_budget),
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
            let chunk = forward.forward(&self.batch, &mut ())?;
            check_logits(chunk, &self.batch, self.config.vocab_size)?;
            logits.extend_from_slice(chunk);
        }
        Ok(logits)
    }

    /// Do something that runs code which might panic. After a panic the decoder is not to be
    /// trusted: it goes, its cache with it, and the requests that remain run again from their
    /// first token on a new one, in pages of their own.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let panic = match catch_unwind(AssertUnwindSafe(|| work(self))) {
            Ok(result) => return result,
            Err(panic) => panic,
        };
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let broken = self.forward.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(broken)));
        for task in &mut self.running {
            self.pages.release(&mut task.table);
            task.sequence.forget_cache();
        }
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
        set(&self.counters.running, self.running_places());
        set(&self.counters.waiting, places(&self.waiting));
        set(&self.counters.pages_used, self.pages.used());
    }
}

/// The masks of a step's rows, as their requests have them.
struct Masks<'a> {
    tasks: &'a mut [Task],
    choosers: &'a [Option<usize>],
}

impl Allowed for Masks<'_> {
    fn of(&mut self, output: usize) -> Option<&[u32]> {
        let chooser = (*self.choosers.get(output)?)?;
        self.tasks.get_mut(chooser)?.sequence.allowed()
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
mod tests;
