//! One request's way out of the engine: a queue of deltas, for a thread that waits or for an event
//! loop that watches a file descriptor. The engine never waits for a reader: see `BACKLOG`. Knows
//! no engine.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sequence::Delta;

/// Deltas that wait for a slow reader before new ones are added to those that wait: a queue never has
/// more than these and one for each further completion. Nothing of a delta is lost, a completion's
/// tokens stay in order, and what is held is bounded by what the request may generate.
const BACKLOG: usize = 64;

/// Lock, whatever became of the last holder: every state here is sound between statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells an event loop which of its streams have something, through one file descriptor.
///
/// The loop watches `fd` for reading and calls `drain`. Each stream is subscribed under a number of
/// the loop's own choice.
#[derive(Debug)]
pub struct Notifier {
    /// Holds a byte exactly while `ready` holds a number.
    ready: Mutex<BTreeSet<u64>>,
    reader: UnixStream,
    writer: UnixStream,
}

impl Notifier {
    /// # Errors
    /// `Internal` when the system has no file descriptors left.
    pub fn new() -> Result<Self> {
        let pair = || {
            let (reader, writer) = UnixStream::pair()?;
            reader.set_nonblocking(true)?;
            writer.set_nonblocking(true)?;
            Ok((reader, writer))
        };
        let (reader, writer) = pair().map_err(|e: std::io::Error| {
            Error::Internal(format!("no socket pair for a notifier: {e}"))
        })?;
        Ok(Self {
            ready: Mutex::new(BTreeSet::new()),
            reader,
            writer,
        })
    }

    /// Readable while some stream has something. Stays valid as long as the notifier.
    pub fn fd(&self) -> RawFd {
        self.reader.as_raw_fd()
    }

    /// The streams that got something since the last call, each once, ascending.
    pub fn drain(&self) -> Vec<u64> {
        let mut ready = lock(&self.ready);
        let mut bytes = [0; 16];
        while matches!((&self.reader).read(&mut bytes), Ok(n) if n > 0) {}
        std::mem::take(&mut *ready).into_iter().collect()
    }

    fn notify(&self, id: u64) {
        let mut ready = lock(&self.ready);
        if ready.is_empty() {
            // A full socket is readable already, and a closed one has no reader to tell.
            let _ = (&self.writer).write(&[1]);
        }
        ready.insert(id);
    }
}

#[derive(Debug, Default)]
struct Channel {
    state: Mutex<State>,
    changed: Condvar,
    /// The consumer left, or got an error. Outside the lock, so that leaving never waits.
    cancelled: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Result<Delta>>,
    /// Nothing will be added to `queue`.
    ended: bool,
    /// Completions that have not ended.
    open: usize,
    subscriber: Option<(Arc<Notifier>, u64)>,
}

impl State {
    /// Let the reader have a delta: by itself, or, where it is behind, with the last that waits of
    /// the same completion.
    fn put(&mut self, delta: Delta) {
        let behind = self.queue.len() >= BACKLOG;
        let waiting = self.queue.iter_mut().rev().filter(|_| behind);
        match waiting
            .flatten()
            .find(|waiting| waiting.index == delta.index)
        {
            Some(waiting) => waiting.append(delta),
            None => self.queue.push_back(Ok(delta)),
        }
    }
}

impl Channel {
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        change(&mut state);
        self.changed.notify_all();
        if let Some((notifier, id)) = &state.subscriber {
            notifier.notify(*id);
        }
    }
}

/// The engine's end and the consumer's end of one request. `Sender::beside` makes the ends of its
/// further completions.
pub(crate) fn channel() -> (Sender, Stream) {
    let channel = Arc::new(Channel::default());
    lock(&channel.state).open = 1;
    let stream = Stream {
        channel: channel.clone(),
        process: std::process::id(),
    };
    (
        Sender {
            channel,
            index: 0,
            ended: false,
        },
        stream,
    )
}

/// The engine's end of one completion. Dropped before its end, it tells the consumer `Closed`.
#[derive(Debug)]
pub(crate) struct Sender {
    channel: Arc<Channel>,
    /// Which of the request's completions.
    index: usize,
    ended: bool,
}

impl Sender {
    /// The end of another completion of the same request: the stream goes on until both have ended.
    pub fn beside(&self, index: usize) -> Self {
        lock(&self.channel.state).open += 1;
        Self {
            channel: self.channel.clone(),
            index,
            ended: false,
        }
    }

    /// A delta with a finish reason is the completion's last; an error is the whole request's. Never
    /// waits: see `BACKLOG`.
    pub fn send(&mut self, item: Result<Delta>) {
        if self.ended {
            return;
        }
        let index = self.index;
        let item = item.map(|delta| Delta { index, ..delta });
        self.ended = item
            .as_ref()
            .map_or(true, |delta| delta.finish_reason.is_some());
        let (ended, failed) = (self.ended, item.is_err());
        if failed {
            self.channel.cancelled.store(true, Ordering::Relaxed);
        }
        self.channel.change(|state| {
            // A consumer that cancelled has ended the stream itself.
            if !state.ended {
                match item {
                    Ok(delta) => state.put(delta),
                    Err(error) => state.queue.push_back(Err(error)),
                }
                state.open -= usize::from(ended);
                state.ended = failed || state.open == 0;
            }
        });
    }

    /// All was sent, or an error.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Nothing more is wanted: all was sent, another completion failed, or the consumer left.
    pub fn over(&self) -> bool {
        self.ended || self.channel.cancelled.load(Ordering::Relaxed)
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.send(Err(Error::Closed));
    }
}

/// The consumer's end of one request: the deltas of all its completions as they come, told apart by
/// `Delta::index`. Dropping it cancels the request.
///
/// As an iterator it blocks for each delta, and ends after the last completion's finish reason or
/// after an error.
#[derive(Debug)]
pub struct Stream {
    channel: Arc<Channel>,
    /// Where its engine thread lives.
    process: u32,
}

impl Stream {
    /// The next delta, waiting for it up to `timeout`. None: nothing came in time, or all came
    /// (then `ended` is true).
    ///
    /// # Errors
    /// The request's failure, once; the stream has then ended.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Option<Delta>> {
        // Too far for the clock is for ever.
        self.recv(Instant::now().checked_add(timeout))
    }

    /// The next delta if it is there already.
    ///
    /// # Errors
    /// As `recv_timeout`.
    pub fn try_recv(&self) -> Result<Option<Delta>> {
        self.recv_timeout(Duration::ZERO)
    }

    /// Whether everything was received.
    pub fn ended(&self) -> bool {
        if self.foreign() {
            return true;
        }
        let state = lock(&self.channel.state);
        state.ended && state.queue.is_empty()
    }

    /// Leave: the request stops at the engine's next step, and nothing more is received.
    pub fn cancel(&self) {
        self.channel.cancelled.store(true, Ordering::Relaxed);
        if self.foreign() {
            return;
        }
        self.channel.change(|state| {
            state.ended = true;
            state.queue.clear();
        });
    }

    /// Have `notifier` name `id` whenever there is something to receive, from now on and for what
    /// is there already.
    pub fn subscribe(&self, notifier: &Arc<Notifier>, id: u64) {
        if self.foreign() {
            return;
        }
        let mut state = lock(&self.channel.state);
        if state.ended || !state.queue.is_empty() {
            notifier.notify(id);
        }
        state.subscriber = Some((notifier.clone(), id));
    }

    /// After a fork the engine thread is the parent's, and may have held the lock at that moment.
    fn foreign(&self) -> bool {
        self.process != std::process::id()
    }

    fn recv(&self, until: Option<Instant>) -> Result<Option<Delta>> {
        if self.foreign() {
            return Err(Error::InvalidRequest(format!(
                "this stream belongs to process {}, not to its fork {}",
                self.process,
                std::process::id()
            )));
        }
        let mut state = lock(&self.channel.state);
        loop {
            if let Some(item) = state.queue.pop_front() {
                return item.map(Some);
            }
            if state.ended {
                return Ok(None);
            }
            let wait = match until {
                None => Duration::from_secs(3600),
                Some(until) => until.saturating_duration_since(Instant::now()),
            };
            if wait.is_zero() {
                return Ok(None);
            }
            let waited = self.channel.changed.wait_timeout(state, wait);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Iterator for Stream {
    type Item = Result<Delta>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.foreign() && self.channel.cancelled.swap(true, Ordering::Relaxed) {
            true => None,
            false => self.recv(None).transpose(),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // No lock: see `cancelled`. A fork's copy has its own flag, so the parent's request goes on.
        self.channel.cancelled.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::response::CallDelta;
    use crate::sequence::{FinishReason, TokenLogprob, Usage};

    fn delta(text: &str, finish_reason: Option<FinishReason>) -> Result<Delta> {
        Ok(Delta {
            text: text.into(),
            finish_reason,
            ..Delta::default()
        })
    }

    fn readable(notifier: &Notifier) -> bool {
        let reader = notifier.reader.try_clone().unwrap();
        reader.set_nonblocking(true).unwrap();
        // Look without drawing the byte out of the notifier's account.
        let found = matches!((&reader).read(&mut [0]), Ok(1));
        if found {
            let _ = (&notifier.writer).write(&[1]);
        }
        found
    }

    #[test]
    fn deltas_come_in_order_and_end_with_the_finish_reason() {
        let (mut sender, mut stream) = channel();
        assert_eq!(stream.try_recv().unwrap(), None);
        assert!(!stream.ended());
        sender.send(delta("a", None));
        sender.send(delta("b", Some(FinishReason::Stop)));
        sender.send(delta("c", None));
        drop(sender);
        assert!(!stream.ended());
        let texts: Vec<String> = stream.by_ref().map(|delta| delta.unwrap().text).collect();
        assert_eq!(texts, ["a", "b"]);
        assert!(stream.ended());
        assert_eq!(stream.try_recv().unwrap(), None);
    }

    #[test]
    fn several_completions_end_the_stream_together() {
        let (mut one, mut stream) = channel();
        let mut two = one.beside(1);
        one.send(delta("a", Some(FinishReason::Stop)));
        assert!(one.over() && !two.over());
        drop(one);
        two.send(delta("b", None));
        two.send(delta("c", Some(FinishReason::Length)));
        let deltas: Vec<Delta> = stream.by_ref().map(Result::unwrap).collect();
        let come: Vec<(usize, &str)> = deltas.iter().map(|d| (d.index, &*d.text)).collect();
        assert_eq!(come, [(0, "a"), (1, "b"), (1, "c")]);
        assert!(stream.ended());
    }

    #[test]
    fn the_error_of_one_completion_ends_all() {
        let (mut one, mut stream) = channel();
        let two = one.beside(1);
        one.send(Err(Error::Closed));
        assert!(two.over());
        drop(two);
        assert!(matches!(stream.next(), Some(Err(Error::Closed))));
        assert!(stream.next().is_none());
    }

    /// What a token of completion `index` brings: everything a delta can have of it.
    fn token(index: usize, id: u32) -> Delta {
        Delta {
            index,
            text: format!("{id} "),
            reasoning: format!("{id}?"),
            tool_calls: vec![CallDelta {
                index: 0,
                id: (id == 0).then(|| "call".into()),
                name: (id == 0).then(|| "add".into()),
                arguments: format!("{id},"),
            }],
            token_ids: vec![id],
            logprobs: vec![TokenLogprob {
                token: id,
                logprob: -1.0,
                top: Vec::new(),
            }],
            ..Delta::default()
        }
    }

    fn sum(deltas: impl IntoIterator<Item = Delta>) -> Delta {
        let mut deltas = deltas.into_iter();
        let mut sum = deltas.next().unwrap_or_default();
        deltas.for_each(|delta| sum.append(delta));
        sum
    }

    #[test]
    fn a_reader_that_is_behind_gets_everything_in_order_from_a_queue_that_stays_short() {
        let (mut one, mut stream) = channel();
        let mut two = one.beside(1);
        let usage = Usage {
            prompt_tokens: 1,
            completion_tokens: 1000,
            reasoning_tokens: None,
            time_to_first_token: Duration::ZERO,
            total_time: Duration::ZERO,
        };
        let sent = |index| {
            (0..1000).map(move |id| Delta {
                prompt_logprobs: (id == 0 && index == 0).then(Vec::new),
                finish_reason: (id == 999).then_some(FinishReason::Length),
                usage: (id == 999).then_some(usage),
                ..token(index, id)
            })
        };
        for (of_one, of_two) in sent(0).zip(sent(1)) {
            one.send(Ok(of_one));
            two.send(Ok(of_two));
        }
        let got: Vec<Delta> = stream.by_ref().map(Result::unwrap).collect();
        assert!((3..=BACKLOG + 1).contains(&got.len()), "{}", got.len());
        for index in [0, 1] {
            let got = sum(got.iter().filter(|delta| delta.index == index).cloned());
            assert_eq!(got, sum(sent(index)));
            assert_eq!(got.token_ids, (0..1000).collect::<Vec<u32>>());
            assert_eq!(got.logprobs.len(), 1000);
            assert_eq!(got.usage, Some(usage));
        }
        assert!(stream.ended());
    }

    #[test]
    fn a_completion_that_has_nothing_waiting_gets_a_place_behind_a_full_queue() {
        let (mut one, mut stream) = channel();
        let mut two = one.beside(1);
        (0..BACKLOG as u32 + 3).for_each(|id| one.send(Ok(token(0, id))));
        two.send(Ok(token(1, 0)));
        two.send(Ok(token(1, 1)));
        one.send(Err(Error::Closed));
        let last = stream.by_ref().nth(BACKLOG).unwrap().unwrap();
        assert_eq!((last.index, last.token_ids), (1, vec![0, 1]));
        assert!(matches!(stream.next(), Some(Err(Error::Closed))));
    }

    #[test]
    fn a_reader_that_caught_up_gets_a_delta_for_each_token_again() {
        let (mut sender, stream) = channel();
        (0..3 * BACKLOG as u32).for_each(|id| sender.send(Ok(token(0, id))));
        while stream.try_recv().unwrap().is_some() {}
        for id in [7, 8] {
            sender.send(Ok(token(0, id)));
        }
        let one = |id| Some(token(0, id));
        assert_eq!(stream.try_recv().unwrap(), one(7));
        assert_eq!(stream.try_recv().unwrap(), one(8));
    }

    #[test]
    fn an_error_comes_once_and_ends_the_stream() {
        let (mut sender, mut stream) = channel();
        sender.send(Err(Error::Internal("x".into())));
        assert!(matches!(stream.next(), Some(Err(Error::Internal(_)))));
        assert!(stream.next().is_none());
    }

    #[test]
    fn a_lost_sender_is_a_closed_engine() {
        let (sender, mut stream) = channel();
        let waiting = std::thread::spawn(move || stream.next());
        drop(sender);
        assert!(matches!(waiting.join().unwrap(), Some(Err(Error::Closed))));
    }

    #[test]
    fn waiting_ends_with_the_time_given() {
        let (_sender, stream) = channel();
        let start = Instant::now();
        assert_eq!(
            stream.recv_timeout(Duration::from_millis(20)).unwrap(),
            None
        );
        assert!(start.elapsed() >= Duration::from_millis(20));
    }

    #[test]
    fn a_cancelled_stream_is_empty_and_wakes_who_waits() {
        let (mut sender, stream) = channel();
        sender.send(delta("a", None));
        stream.cancel();
        assert!(sender.over());
        sender.send(delta("b", None));
        assert!(stream.ended());
        assert_eq!(stream.recv_timeout(Duration::MAX).unwrap(), None);
    }

    #[test]
    fn a_dropped_stream_tells_the_engine() {
        let (sender, stream) = channel();
        assert!(!sender.over());
        drop(stream);
        assert!(sender.over());
    }

    #[test]
    fn a_stream_is_of_no_use_in_a_fork() {
        let (_sender, stream) = channel();
        let mut inherited = Stream {
            process: stream.process + 1,
            channel: stream.channel.clone(),
        };
        assert!(inherited.recv_timeout(Duration::MAX).is_err());
        assert!(inherited.next().unwrap().is_err() && inherited.next().is_none());
    }

    #[test]
    fn one_descriptor_names_every_stream_that_has_something_once() {
        let notifier = Arc::new(Notifier::new().unwrap());
        let (mut one, stream_one) = channel();
        let (mut two, stream_two) = channel();
        one.send(delta("a", None));
        stream_one.subscribe(&notifier, 7);
        stream_two.subscribe(&notifier, 3);
        assert!(readable(&notifier));
        one.send(delta("b", None));
        two.send(delta("c", None));
        assert_eq!(notifier.drain(), [3, 7]);
        assert!(!readable(&notifier));
        assert!(notifier.drain().is_empty());
        drop(two);
        assert!(readable(&notifier));
        assert_eq!(notifier.drain(), [3]);
    }
}
