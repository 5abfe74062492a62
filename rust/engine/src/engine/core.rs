//! The engine without its thread: `step` plans, runs the model, samples and hands out.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::second::{Asker, Drafting, Second};
use super::{Counters, EngineConfig, Factory, LogitsJob, Task, Work, places};
use hfcore_kernels::mmap::Mapped;

use crate::batch::{Batch, Caller, Forward, PAGE};
use crate::constraint::Aside;
use crate::error::{Error, Result};
use crate::pace::Pace;
use crate::pages::Pages;
use crate::prefix::{Beginning, Place, Prefixes};
use crate::saved::Saved;
use crate::scheduler::{self, Job};

/// Rows whose logits are made at a time where those of every position are wanted: a large vocabulary
/// makes a megabyte of each.
pub(super) const LOGIT_ROWS: usize = 64;

/// Guesses of one request in a step, at most.
const GUESSES: usize = 15;

/// Known tokens of one that decodes that run at once; more, after its cache was lost, are as a prompt.
const FORCED: usize = 32;

/// The engine without its thread.
pub(super) struct Core {
    config: EngineConfig,
    factory: Factory,
    make_second: Option<(Factory, usize)>,
    /// None before the first request, and after a panic.
    forward: Option<Box<dyn Forward>>,
    /// With `forward`, where there is one.
    second: Option<Second>,
    pages: Pages,
    prefixes: Prefixes,
    /// The higher priority first, then in order of arrival.
    waiting: VecDeque<Work>,
    /// In the order in which they were let in.
    running: Vec<Task>,
    batch: Batch,
    /// Which of `running` chooses a token by each output of the batch, if one does.
    choosers: Vec<Option<usize>>,
    /// Room for a request's next tokens.
    tokens: Vec<u32>,
    pace: Pace,
    /// Makes the grammars' masks while the model runs.
    aside: Aside,
    next_id: u64,
    counters: Arc<Counters>,
}

impl Core {
    pub fn new(
        config: EngineConfig,
        (factory, make_second): (Factory, Option<(Factory, usize)>),
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            pages: Pages::new(config.pages),
            config,
            factory,
            make_second,
            forward: None,
            second: None,
            prefixes: Prefixes::default(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            batch: Batch::default(),
            choosers: Vec::new(),
            tokens: Vec::new(),
            pace: Pace::default(),
            aside: Aside::default(),
            next_id: 0,
            counters,
        }
    }

    pub fn idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Let work wait for its turn, behind what came before with the same priority.
    pub fn queue(&mut self, work: Work) {
        let work = match work {
            Work::Now(job) => return job(self),
            work => work,
        };
        let priority = work.priority();
        let at = self
            .waiting
            .partition_point(|other| other.priority() >= priority);
        self.waiting.insert(at, work);
    }

    /// One round: who may run, what runs, what came of it.
    pub fn step(&mut self) {
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
        if let Err(error) = self.guarded(Self::guess) {
            self.fail_everything(&error);
            return;
        }
        let jobs = self.jobs();
        let decode: usize = jobs
            .iter()
            .filter(|job| !job.prompt)
            .map(|job| job.rows)
            .sum();
        let budget = self.config.token_budget;
        let plan = scheduler::plan(&jobs, budget, self.pace.prompt_rows(decode, budget));
        if plan.is_empty() {
            return;
        }
        let start = Instant::now();
        let run = self.guarded(|core| core.run(&plan));
        let took = start.elapsed();
        let micros = took.as_micros() as u64;
        let busy = &self.counters.busy_micros;
        busy.fetch_add(micros, Ordering::Relaxed);
        match run {
            Ok(Ran::Left) => {}
            Ok(Ran::Whole) => {
                let rows: usize = plan.iter().map(|(_, rows)| rows).sum();
                let decode = decode.min(rows);
                let pace = &mut self.pace;
                pace.measured(decode, rows - decode, took.as_secs_f32());
                self.start_followers();
            }
            Err(error) => self.fail(&plan, &error),
        }
        self.retire();
    }

    /// What the cache holds, for a file.
    pub fn save(&mut self) -> Result<Saved<Vec<u8>>> {
        let page_bytes = self.page_bytes()?;
        let (pages, numbers) = self.prefixes.filled();
        let mut bytes = Vec::with_capacity(numbers.len() * page_bytes);
        if let Some(forward) = &self.forward {
            for page in numbers {
                forward.read_page(page, &mut bytes);
            }
        }
        Ok(Saved {
            pages,
            page_bytes,
            bytes,
        })
    }

    /// Take in what a file holds, as far as there is room; the tokens of it that are there now.
    pub fn restore(&mut self, saved: &Saved<Mapped>) -> Result<usize> {
        let Some(forward) = &mut self.forward else {
            return Err(Error::Closed);
        };
        let fill = |page, at| forward.write_page(page, saved.page(at));
        let there = self.prefixes.take_in(&saved.pages, &mut self.pages, fill);
        self.publish();
        Ok(there * PAGE)
    }

    /// Bytes of a page, as the decoder has them.
    pub fn page_bytes(&mut self) -> Result<usize> {
        if !self.config.prefix_cache {
            let problem = "prefix_cache is off: nothing that has run is kept";
            return Err(Error::InvalidRequest(problem.into()));
        }
        self.make_forward()?;
        let bytes = self
            .forward
            .as_ref()
            .and_then(|forward| forward.page_bytes());
        bytes.ok_or_else(|| {
            Error::InvalidRequest("this device does not give its cache away; the cpu does".into())
        })
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
        if let Some((factory, context)) = self.make_second.clone() {
            let pages = self.config.pages;
            self.second = Some(self.guarded(|_| Second::new(&factory, context, pages))?);
        }
        self.forward = Some(forward);
        Ok(())
    }

    /// Give every running request the pages its next step writes to; where none are to be had the
    /// last one let in of the lowest priority gives up its own and waits again. The first fits alone:
    /// see `context`.
    fn make_room(&mut self) {
        let mut i = 0;
        while let Some(task) = self.running.get_mut(i) {
            let pages = task.sequence.len().div_ceil(PAGE);
            if grow(&mut self.pages, &mut self.prefixes, &mut task.table, pages) {
                i += 1;
                continue;
            }
            let of = |(i, task): (usize, &Task)| (task.priority, std::cmp::Reverse(i));
            let last = self.running.iter().enumerate().map(of).min();
            let Some((_, std::cmp::Reverse(last))) = last else {
                return;
            };
            let mut task = self.running.remove(last);
            i -= usize::from(last < i);
            self.leave(&mut task);
            task.sequence.forget_cache();
            task.drafting = Drafting::default();
            let at = self
                .waiting
                .partition_point(|other| other.priority() > task.priority);
            self.waiting.insert(at, Work::Generate(Box::new(task)));
            self.counters.preemptions.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A request gives up its pages and its place among the prefixes.
    fn leave(&mut self, task: &mut Task) {
        leave(&mut self.pages, &mut self.prefixes, task);
    }

    /// Let waiting work run, first come first served, while there are places and pages. Who finds
    /// another computing what it begins with waits for that; who comes after it need not.
    fn admit(&mut self) {
        let mut i = 0;
        while let Some(work) = self.waiting.get_mut(i) {
            if places_of(&self.running) + work.places() > self.config.max_sequences {
                return;
            }
            let mut table = Vec::new();
            let mut found = 0;
            let tokens = match work {
                Work::Logits(job) => job.ids.len(),
                Work::Now(_) => 0,
                Work::Generate(task) => {
                    if let Some(place) = task.waits_for
                        && !self.prefixes.settled(place)
                    {
                        lend(&mut self.running, &self.prefixes, place, task.priority);
                        i += 1;
                        continue;
                    }
                    if self.config.prefix_cache && !task.sequence.wants_all_logits() {
                        let begun = self.prefixes.find(task.sequence.ids(), task.begins);
                        task.waits_for = begun.pending;
                        if begun.pending.is_some() {
                            i += 1;
                            continue;
                        }
                        self.pages.retain(&begun.pages);
                        table = begun.pages;
                        found = table.len();
                    }
                    task.sequence.len()
                }
            };
            let pages = tokens.div_ceil(PAGE);
            if !grow(&mut self.pages, &mut self.prefixes, &mut table, pages) {
                self.pages.release(&mut table);
                return;
            }
            match self.waiting.remove(i) {
                Some(Work::Generate(task)) => self.let_in(*task, table, found),
                Some(Work::Logits(job)) => {
                    let logits = self.guarded(|core| core.logits(&job, &table));
                    // Who asked may have gone.
                    let _ = job.answer.send(logits);
                    self.pages.release(&mut table);
                }
                Some(Work::Now(_)) | None => self.pages.release(&mut table),
            }
        }
    }

    /// Run a request with its pages, whose first `found` are filled.
    fn let_in(&mut self, task: Task, table: Vec<u32>, found: usize) {
        self.next_id += 1;
        let mut task = Task {
            id: self.next_id,
            table,
            ..task
        };
        if self.config.prefix_cache {
            let ids = task.sequence.ids();
            let add =
                |counter: &AtomicU64, n: usize| counter.fetch_add(n as u64, Ordering::Relaxed);
            add(&self.counters.prefix_lookup_tokens, ids.len());
            add(&self.counters.prefix_hit_tokens, found * PAGE);
            let path = self
                .prefixes
                .enter(ids, task.begins, found, &task.table, &mut self.pages);
            task.path = Some(path);
        }
        task.sequence.ran(found * PAGE);
        self.running.push(task);
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
                if self.config.prefix_cache {
                    let ids = task.sequence.ids();
                    let (begins, pages) = (task.begins, &mut self.pages);
                    task.path = Some(self.prefixes.enter(ids, begins, full, &shared, pages));
                }
            }
            self.running.splice(i..i, followers);
        }
    }

    /// Let those who decode guess, as many tokens as pay: as their own text goes on, or else as the second model does.
    fn guess(&mut self) -> Result<()> {
        let decoding = |task: &&mut Task| task.sequence.decoding();
        let mut rows = self.running.iter_mut().filter(decoding).count();
        let mut tokens = rows as f32;
        let mut askers = Vec::new();
        for (place, task) in self.running.iter_mut().enumerate() {
            let Some(most) = task.sequence.may_guess() else {
                continue;
            };
            let most = most
                .min(GUESSES)
                .min(self.config.token_budget.saturating_sub(rows));
            let chances = task.sequence.chances();
            let (n, brings) = self.pace.guesses(rows, tokens, chances, most);
            let mut room = |n: usize| {
                let pages = (task.sequence.len() + n).div_ceil(PAGE);
                grow(&mut self.pages, &mut self.prefixes, &mut task.table, pages)
            };
            if n > 0 && room(n) {
                task.sequence.guess(n);
                rows += n;
                tokens += brings;
                continue;
            }
            let second = self.second.as_ref();
            let most = most.min(second.map_or(0, |second| second.room(task.sequence.len())));
            if most > 0 && room(most) {
                askers.push(Asker::new(place, most));
            }
            task.sequence.guess(0);
        }
        let Some(second) = &mut self.second else {
            return Ok(());
        };
        // What it has to read first must not keep the others waiting.
        let budget = self.config.token_budget;
        let budget = self.pace.prompt_rows(rows.saturating_sub(1), budget);
        let (running, pages, pace) = (&mut self.running, &self.pages, &self.pace);
        let start = Instant::now();
        let askers = second.guess(askers, running, pages, (rows, tokens), (pace, budget))?;
        let took = start.elapsed().as_micros() as u64;
        self.counters.busy_micros.fetch_add(took, Ordering::Relaxed);
        for asker in askers {
            let sequence = &mut running[asker.place].sequence;
            sequence.guess_these(asker.tokens());
        }
        Ok(())
    }

    /// What there is to run. Prompts whose logits are all wanted share `LOGIT_ROWS` of a step; those
    /// for which none is left wait.
    fn jobs(&self) -> Vec<Job> {
        let mut logit_rows = LOGIT_ROWS;
        let job = |task: &Task| {
            let sequence = &task.sequence;
            let mut rows = sequence.rows();
            if sequence.wants_all_logits() {
                rows = rows.min(logit_rows);
                logit_rows -= rows;
                if rows == 0 {
                    return None;
                }
            }
            Some(Job {
                id: task.id,
                rows,
                prompt: sequence.completion_tokens() == 0 || rows > FORCED,
                priority: task.priority,
            })
        };
        self.running.iter().filter_map(job).collect()
    }

    /// Run the model over the planned tokens, and take each sequence on that reached its end.
    fn run(&mut self, plan: &[(u64, usize)]) -> Result<Ran> {
        // Lost to a panic in `admit`: the next step makes a new one.
        let Some(forward) = &mut self.forward else {
            return Ok(Ran::Left);
        };
        self.batch.clear();
        self.choosers.clear();
        for &(id, rows) in plan {
            let Some(place) = self.running.iter().position(|task| task.id == id) else {
                continue;
            };
            let task = &mut self.running[place];
            task.sequence.prepare(rows, &mut self.aside);
            let start = task.sequence.next(rows, &mut self.tokens);
            let Beginning { long, adapter } = task.begins;
            self.batch.push(&self.tokens, start, &task.table, long);
            self.batch.adapt(adapter);
            let end = self.batch.tokens.len() as u32;
            let wanted = task.sequence.rows_wanted(rows) as u32;
            self.batch.outputs.extend(end - wanted..end);
            self.choosers.resize(self.batch.outputs.len(), None);
            // Who guesses is not within a grammar.
            if rows == task.sequence.pending()
                && let Some(last) = self.choosers.last_mut()
            {
                *last = Some(place);
            }
        }
        self.counters.steps.fetch_add(1, Ordering::Relaxed);
        let mut watch = Watch {
            tasks: &mut self.running,
            choosers: &self.choosers,
            plan,
        };
        let logits = forward.forward(&self.batch, &mut watch)?;
        if watch.gone() {
            return Ok(Ran::Left);
        }
        check_logits(logits, &self.batch, self.config.vocab_size)?;
        let mut logits = logits.chunks_exact(self.config.vocab_size);
        for &(id, rows) in plan {
            let Some(task) = self.running.iter_mut().find(|task| task.id == id) else {
                continue;
            };
            let wanted = task.sequence.rows_wanted(rows);
            let logits: Vec<&[f32]> = logits.by_ref().take(wanted).collect();
            take(task, rows, &logits, &self.counters);
            if self.config.prefix_cache {
                let (ids, cached) = (task.sequence.ids(), task.sequence.cached());
                let (table, pages) = (&task.table, &mut self.pages);
                match &mut task.path {
                    Some(path) => self.prefixes.ran(path, ids, cached, table, pages),
                    // Its pages are new, after a panic.
                    None => {
                        let path = self.prefixes.enter(ids, task.begins, 0, table, pages);
                        task.path = Some(path);
                    }
                }
            }
        }
        Ok(Ran::Whole)
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
            self.batch.push(ids, start, table, job.begins.long);
            self.batch.adapt(job.begins.adapter);
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
    pub fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let panic = match catch_unwind(AssertUnwindSafe(|| work(self))) {
            Ok(result) => return result,
            Err(panic) => panic,
        };
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let broken = (self.forward.take(), self.second.take());
        let _ = catch_unwind(AssertUnwindSafe(|| drop(broken)));
        for task in &mut self.running {
            leave(&mut self.pages, &mut self.prefixes, task);
            task.sequence.forget_cache();
            task.drafting = Drafting::default();
        }
        self.prefixes.clear(&mut self.pages);
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
    pub fn fail_everything(&mut self, error: &Error) {
        for task in &mut self.running {
            task.sender.send(Err(error.clone()));
        }
        for work in self.waiting.drain(..) {
            match work {
                Work::Generate(mut task) => task.sender.send(Err(error.clone())),
                Work::Logits(job) => {
                    let _ = job.answer.send(Err(error.clone()));
                }
                // Never waits.
                Work::Now(_) => {}
            }
        }
        self.retire();
    }

    /// End the requests whose time is up.
    fn expire(&mut self) {
        let now = Instant::now();
        let waiting = self.waiting.iter_mut().filter_map(|work| match work {
            Work::Generate(task) => Some(task.as_mut()),
            Work::Logits(_) | Work::Now(_) => None,
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
        let (pages, prefixes, cancelled) = (
            &mut self.pages,
            &mut self.prefixes,
            &self.counters.cancelled,
        );
        let over = |task: &Task| {
            // Asked once: a consumer may leave at any moment.
            let over = task.sender.over();
            let left = over && !task.sender.ended();
            cancelled.fetch_add(u64::from(left), Ordering::Relaxed);
            over
        };
        self.running.retain_mut(|task| {
            let over = over(task);
            if over {
                leave(pages, prefixes, task);
            }
            !over
        });
        self.waiting.retain(|work| match work {
            Work::Generate(task) => !over(task),
            Work::Logits(_) | Work::Now(_) => true,
        });
        self.publish();
    }

    fn publish(&self) {
        let set = |gauge: &AtomicU64, n: usize| gauge.store(n as u64, Ordering::Relaxed);
        set(&self.counters.running, places_of(&self.running));
        set(&self.counters.waiting, places(&self.waiting));
        set(&self.counters.pages_used, self.pages.used());
        set(&self.counters.pages_cached, self.pages.idle());
    }
}

/// How far a step came.
enum Ran {
    Whole,
    /// Those who had most of it have gone, or there is no decoder: the others run again.
    Left,
}

/// A step's requests, while the model runs.
struct Watch<'a> {
    tasks: &'a mut [Task],
    choosers: &'a [Option<usize>],
    plan: &'a [(u64, usize)],
}

impl Caller for Watch<'_> {
    fn allowed(&mut self, output: usize) -> Option<&[u32]> {
        let chooser = (*self.choosers.get(output)?)?;
        self.tasks.get_mut(chooser)?.sequence.allowed()
    }

    /// Whether those have left that have most of the rows.
    fn gone(&mut self) -> bool {
        let left = |id: u64| {
            let mut tasks = self.tasks.iter();
            tasks.any(|task| task.id == id && task.sender.over())
        };
        let rows = |of: &mut dyn Iterator<Item = &(u64, usize)>| of.map(|(_, n)| n).sum::<usize>();
        let gone = rows(&mut self.plan.iter().filter(|(id, _)| left(*id)));
        2 * gone > rows(&mut self.plan.iter())
    }
}

fn places_of(running: &[Task]) -> usize {
    running.iter().map(Task::places).sum()
}

/// Give a table so many pages, from what is kept for requests to come if need be; false, and nothing
/// given, where they are not to be had.
fn grow(pages: &mut Pages, prefixes: &mut Prefixes, table: &mut Vec<u32>, length: usize) -> bool {
    let missing = length.saturating_sub(table.len());
    // What would not suffice stays: another request may find it.
    if missing > pages.free() && missing <= pages.free() + pages.idle() {
        prefixes.evict(missing, pages);
    }
    pages.grow(table, length)
}

/// Who computes what another waits for has its priority until then: nobody in between holds both up.
fn lend(running: &mut [Task], prefixes: &Prefixes, place: Place, priority: i32) {
    let lower = running.iter_mut().filter(|task| task.priority < priority);
    for task in lower {
        if task.path.is_some_and(|path| prefixes.passes(path, place)) {
            task.priority = priority;
        }
    }
}

fn leave(pages: &mut Pages, prefixes: &mut Prefixes, task: &mut Task) {
    if let Some(path) = task.path.take() {
        prefixes.leave(path, pages);
    }
    pages.release(&mut task.table);
}

/// `rows` of a request have run: choose a token after the last it knew, and go on as long as what it
/// had guessed comes true.
fn take(task: &mut Task, rows: usize, logits: &[&[f32]], counters: &Counters) {
    let add = |counter: &AtomicU64, n: usize| counter.fetch_add(n as u64, Ordering::Relaxed);
    let sequence = &mut task.sequence;
    add(&counters.drafted_tokens, sequence.ran(rows));
    let mut row = 0;
    while let Some(logits) = logits.get(row) {
        let before = sequence.len();
        row += match sequence.take(logits).transpose() {
            None => 1,
            Some(delta) => {
                let (tokens, over) = match &delta {
                    Ok(delta) => (delta.token_ids.len(), delta.finish_reason.is_some()),
                    Err(_) => (0, true),
                };
                add(&counters.completion_tokens, tokens);
                task.sender.send(delta);
                let came_true = sequence.confirm(before);
                add(&counters.accepted_tokens, came_true);
                if over || came_true < tokens {
                    return;
                }
                came_true
            }
        };
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
