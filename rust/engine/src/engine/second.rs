//! A second, smaller model of the same vocabulary that guesses what the first will say. It changes no token.

use std::collections::HashSet;
use std::time::Instant;

use super::{Factory, Task};
use crate::batch::{Batch, Forward, PAGE};
use crate::draft::Chances;
use crate::error::Result;
use crate::pace::Pace;
use crate::pages::Pages;
use crate::sampling::two_likeliest;

/// The second model. It keeps keys and values in a cache of its own, under the same page numbers as the first does: who
/// shares a page there shares it here.
pub struct Second {
    forward: Box<dyn Forward>,
    /// Tokens that it can have before it.
    context: usize,
    /// By page, the turn (see [`Pages::turn`]) in which it was filled; 0: never.
    filled: Vec<u64>,
    pace: Pace,
    /// By how clearly it prefers a token, how likely that comes true.
    chances: Chances,
    /// The same of all guesses, for those not made yet.
    usual: f32,
    batch: Batch,
}

/// What the second model has done for a request.
#[derive(Debug, Default)]
pub struct Drafting {
    /// How many of the request's tokens have its keys and values.
    cached: usize,
    /// Its last guesses, with the class of each: from position `at` on.
    at: usize,
    guesses: Vec<(u32, usize)>,
}

/// A request that may guess in this step.
pub struct Asker {
    /// Its place among those that run.
    pub place: usize,
    /// How many tokens, at most.
    pub most: usize,
    guesses: Vec<(u32, usize)>,
    /// How likely all of them are true.
    all: f32,
}

impl Asker {
    pub fn new(place: usize, most: usize) -> Self {
        Self {
            place,
            most,
            guesses: Vec::new(),
            all: 1.0,
        }
    }

    pub fn tokens(&self) -> Vec<u32> {
        self.guesses.iter().map(|(token, _)| *token).collect()
    }
}

/// Logits between its best two tokens, up to which a guess is of a class.
const GAPS: [f32; 4] = [0.5, 1.0, 2.0, 4.0];
/// How likely a guess of each class is taken to be at first.
const CHANCES: [f32; GAPS.len() + 1] = [0.4, 0.55, 0.7, 0.85, 0.95];
const USUAL: f32 = 0.7;
/// How far what is thought of guesses goes back to `USUAL` with each step that makes none: so that they are tried again.
const FORGET: f32 = 0.002;
/// Guesses less likely than this are not gone on from.
const LEAST: f32 = 0.2;

impl Second {
    pub fn new(factory: &Factory, context: usize, pages: u32) -> Result<Self> {
        Ok(Self {
            forward: factory()?,
            context,
            filled: vec![0; pages as usize],
            pace: Pace::default(),
            chances: Chances::new(&CHANCES),
            usual: USUAL,
            batch: Batch::default(),
        })
    }

    /// How many tokens it could guess after so many.
    pub fn room(&self, tokens: usize) -> usize {
        self.context.saturating_sub(tokens)
    }

    /// Guess for `askers` as long as that pays, and give back what they guess. `rows` are in the first model's step
    /// without them, which are expected to bring `tokens`; `pace` is the first model's. Of what the second model has yet to
    /// read, `budget` tokens at most are read in one go.
    pub fn guess(
        &mut self,
        askers: Vec<Asker>,
        running: &mut [Task],
        pages: &Pages,
        (mut rows, mut tokens): (usize, f32),
        (pace, budget): (&Pace, usize),
    ) -> Result<Vec<Asker>> {
        for asker in &askers {
            self.learn(&mut running[asker.place]);
        }
        let (mut now, mut done) = (askers, Vec::new());
        let mut spent = 0.0;
        loop {
            let gain: f32 = now.iter().map(|asker| asker.all * self.usual).sum();
            if !self.pays((rows, tokens), (now.len(), gain), spent, pace) {
                break;
            }
            let start = Instant::now();
            let ready = self.read(now, running, pages, budget)?;
            spent += start.elapsed().as_secs_f32();
            rows += ready.len();
            tokens += ready.iter().map(|asker| asker.all).sum::<f32>();
            let on = |asker: &Asker| asker.guesses.len() < asker.most && asker.all > LEAST;
            let (on, over): (Vec<Asker>, Vec<Asker>) = ready.into_iter().partition(on);
            done.extend(over);
            // Who has yet to read a long text guesses in a later step.
            now = on;
        }
        done.extend(now);
        if done.iter().all(|asker| asker.guesses.is_empty()) {
            self.usual += FORGET * (USUAL - self.usual);
            self.chances.forget(FORGET);
        }
        for asker in &done {
            let task = &mut running[asker.place];
            task.drafting.at = task.sequence.len();
            task.drafting.guesses.clone_from(&asker.guesses);
        }
        Ok(done)
    }

    /// Whether one more guess of so many requests makes the step's tokens cheaper.
    fn pays(
        &self,
        (rows, tokens): (usize, f32),
        (askers, gain): (usize, f32),
        spent: f32,
        pace: &Pace,
    ) -> bool {
        let (Some(usual), Some(with)) = (pace.cost(rows), pace.cost(rows + askers)) else {
            return false;
        };
        if askers == 0 {
            return false;
        }
        // Unknown at first: then it is tried.
        let own = self.pace.cost(askers).unwrap_or(0.0);
        (tokens + gain) / (spent + own + with) > tokens / (spent + usual)
    }

    /// What came of a request's last guesses.
    fn learn(&mut self, task: &mut Task) {
        let Drafting {
            cached,
            at,
            guesses,
        } = &mut task.drafting;
        let ids = task.sequence.ids();
        let next = ids.get(*at..).unwrap_or_default();
        let mut right = 0;
        for ((token, class), is) in guesses.iter().zip(next) {
            let came_true = token == is;
            self.chances.learn(*class, came_true);
            self.usual += Chances::WEIGHT * (f32::from(u8::from(came_true)) - self.usual);
            if !came_true {
                break;
            }
            right += 1;
        }
        // It has read them all but the last.
        if *cached == *at {
            *cached += right.min(guesses.len().saturating_sub(1));
        }
        guesses.clear();
    }

    /// Let the requests' texts, with what they guess so far, be read, and guess one token more each: those that are through.
    fn read(
        &mut self,
        askers: Vec<Asker>,
        running: &mut [Task],
        pages: &Pages,
        budget: usize,
    ) -> Result<Vec<Asker>> {
        self.batch.clear();
        let mut left = budget.max(askers.len());
        let mut written: HashSet<u32> = HashSet::new();
        let mut ready = Vec::new();
        let known = self.forward.vocab_size() as u32;
        for asker in askers {
            let task = &mut running[asker.place];
            let drafting = &mut task.drafting;
            let whole = [task.sequence.ids(), &asker.tokens()].concat();
            while self.is_filled(&task.table, drafting.cached / PAGE, pages)
                && (drafting.cached / PAGE + 1) * PAGE < whole.len()
            {
                drafting.cached = (drafting.cached / PAGE + 1) * PAGE;
            }
            let from = match asker.guesses.is_empty() {
                true => drafting.cached.min(whole.len() - 1),
                false => whole.len() - 1,
            };
            let rows = (whole.len() - from).min(left);
            let to = from + rows;
            let touched = &task.table[from / PAGE..to.div_ceil(PAGE)];
            // Two that share what neither has read: one after the other.
            let free = touched.iter().all(|page| !written.contains(page));
            let strange = whole[from..to].iter().any(|id| *id >= known);
            if rows == 0 || !free || strange {
                continue;
            }
            written.extend(touched);
            left -= rows;
            self.batch
                .push(&whole[from..to], from, &task.table, task.begins.long);
            drafting.cached = to.min(task.sequence.len());
            for &page in &task.table[..drafting.cached / PAGE] {
                self.filled[page as usize] = pages.turn(page);
            }
            if to == whole.len() {
                self.batch.outputs.push(self.batch.tokens.len() as u32 - 1);
                ready.push(asker);
            }
        }
        if self.batch.tokens.is_empty() {
            return Ok(Vec::new());
        }
        let start = Instant::now();
        let logits = self.forward.forward(&self.batch, &mut ())?;
        let took = start.elapsed().as_secs_f32();
        let rows = self.batch.tokens.len();
        // A token or two each to catch up with is as one.
        match rows <= 4 * self.batch.spans.len() {
            true => self.pace.measured(rows, 0, took),
            false => self.pace.measured(0, rows, took),
        }
        for (asker, row) in ready.iter_mut().zip(logits.chunks_exact(known as usize)) {
            let (token, gap) = two_likeliest(row);
            let class = GAPS.iter().filter(|least| gap >= **least).count();
            asker.guesses.push((token, class));
            asker.all *= self.chances.of(class);
        }
        Ok(ready)
    }

    fn is_filled(&self, table: &[u32], page: usize, pages: &Pages) -> bool {
        table
            .get(page)
            .is_some_and(|page| self.filled[*page as usize] == pages.turn(*page))
    }
}
