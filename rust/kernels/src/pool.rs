//! The threads: one pool per engine, sized to what this process may use, spinning a little, then asleep.
//!
//! No process-wide state: a pool belongs to the thread that made it and dies with it, so a forked child, which has
//! only the forking thread, makes its own.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps. Longer than the gap between two operations of a step (microseconds)
/// and than the gap between two steps (a sampler's tens of microseconds); an idle engine uses no CPU.
const SPIN: Duration = Duration::from_micros(200);

/// How long the caller spins for the last workers before it sleeps: one of them may have lost its CPU to another process,
/// or to the caller itself.
const PATIENCE: Duration = Duration::from_micros(50);

/// Operations after a long wait in which a next one is likely: some tokens' worth. Without it decoding beside a busy CPU
/// had 0.47 of its speed, with it 0.63; a prefill 0.54 and 0.58.
const CROWDED: usize = 2000;
const FOR_EVER: usize = usize::MAX;

/// One operation: `call(context, unit)` for every unit below `units`.
#[derive(Clone, Copy)]
struct Job {
    call: unsafe fn(*const (), usize),
    context: *const (),
    units: usize,
}

struct Shared {
    /// Written by the caller while no worker is inside, read by workers that are.
    job: std::cell::UnsafeCell<Job>,
    /// Which operation (upper half), whether it takes workers (`OPEN`), and how many are inside (the rest). A worker that
    /// comes late finds it closed: nobody waits for a thread that has not begun.
    state: AtomicU64,
    /// For each thread the next unit of its own part: neighbours in number are neighbours in memory, which a thread reads
    /// faster in one go. Who is done helps the others.
    next: Box<[Next]>,
    stop: AtomicBool,
    /// For so many more operations who waits gives its CPU to who works: there are more threads than CPUs, or another
    /// process takes its part of one. A thread then loses its CPU where nobody waits for it. Written by the caller.
    crowded: AtomicUsize,
    asleep: Vec<AtomicBool>,
    /// The caller, where it sleeps until all are out.
    caller: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// On a cache line of its own.
#[repr(align(64))]
struct Next(AtomicUsize);

impl Shared {
    /// Where the part of thread `i` begins, and that of the one before it ends.
    fn part(&self, units: usize, i: usize) -> usize {
        units * i / self.next.len()
    }
}

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

// SAFETY: `job` is written only by the pool's one caller (`run` takes `&self` under `busy`) while the operation is closed
// and nobody inside, and read by workers only between entering an open one and leaving it.
unsafe impl Sync for Shared {}
// SAFETY: the raw context pointer in `job` is used only while the closure it points to is borrowed by `run`.
unsafe impl Send for Shared {}

/// Threads that run the units of one operation together.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    sleepers: Vec<Thread>,
    /// One operation at a time; a second caller waits.
    busy: Mutex<()>,
}

impl Pool {
    /// `threads` in all, the caller among them; at least one.
    pub fn new(threads: usize) -> Self {
        let workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            job: std::cell::UnsafeCell::new(Job {
                call: nothing,
                context: std::ptr::null(),
                units: 0,
            }),
            state: AtomicU64::new(0),
            next: (0..=workers).map(|_| Next(AtomicUsize::new(0))).collect(),
            stop: AtomicBool::new(false),
            crowded: AtomicUsize::new(match threads > Self::available() {
                true => FOR_EVER,
                false => 0,
            }),
            asleep: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
        });
        let workers: Vec<_> = (0..workers)
            .filter_map(|i| {
                let shared = shared.clone();
                // A thread that cannot be had is one fewer, not a failure.
                thread::Builder::new()
                    .name(format!("hfcore-{i}"))
                    .spawn(move || work(&shared, i))
                    .ok()
            })
            .collect();
        let sleepers = workers.iter().map(|w| w.thread().clone()).collect();
        Self {
            shared,
            workers,
            sleepers,
            busy: Mutex::new(()),
        }
    }

    /// The CPUs this process may use: its affinity mask and its cgroup's quota.
    pub fn available() -> usize {
        thread::available_parallelism().map_or(1, |n| n.get())
    }

    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Call `f(unit)` once for every unit below `units`, on all threads; returns when all are done. Not reentrant: `f`
    /// must not call `run`. A panic in `f` is raised here, after all threads have left it.
    pub fn run<F: Fn(usize) + Sync>(&self, units: usize, f: F) {
        if units <= 1 || self.workers.is_empty() {
            (0..units).for_each(f);
            return;
        }
        let _busy = lock(&self.busy);
        let shared = &*self.shared;
        // SAFETY: the last operation is closed and nobody inside, so none reads the job.
        unsafe {
            *shared.job.get() = Job {
                call: call::<F>,
                context: (&raw const f).cast(),
                units,
            }
        };
        for (i, Next(next)) in shared.next.iter().enumerate() {
            next.store(shared.part(units, i), Relaxed);
        }
        let crowded = shared.crowded.load(Relaxed);
        if crowded > 0 && crowded < FOR_EVER {
            shared.crowded.store(crowded - 1, Relaxed);
        }
        let number = shared.state.load(Relaxed) >> 32;
        shared.state.store((number + 1) << 32 | OPEN, SeqCst);
        for (asleep, thread) in shared.asleep.iter().zip(&self.sleepers) {
            if asleep.load(SeqCst) {
                thread.unpark();
            }
        }
        take_units(shared, 0);
        if shared.state.fetch_and(!OPEN, SeqCst) & INSIDE != 0 {
            wait_for_workers(shared);
        }
        let panicked = lock(&shared.panic).take();
        if let Some(panic) = panicked {
            resume_unwind(panic);
        }
    }

    /// Call `f(i, row)` for every row of `width` items of `out`, in parallel.
    ///
    /// # Panics
    /// When `out` is not whole rows.
    pub fn rows<T: Send, F: Fn(usize, &mut [T]) + Sync>(&self, out: &mut [T], width: usize, f: F) {
        if out.is_empty() {
            return;
        }
        assert!(
            width > 0 && out.len().is_multiple_of(width),
            "{} items are not rows of {width}",
            out.len()
        );
        let count = out.len() / width;
        let chunk = count.div_ceil(self.threads() * 4);
        let base = SendPtr(out.as_mut_ptr());
        self.run(count.div_ceil(chunk), |unit| {
            for row in unit * chunk..count.min((unit + 1) * chunk) {
                // SAFETY: rows are disjoint, inside `out`, and every unit runs once.
                f(row, unsafe {
                    std::slice::from_raw_parts_mut(base.get().add(row * width), width)
                });
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.shared.state.fetch_add(1 << 32, SeqCst);
        for (worker, thread) in self.workers.drain(..).zip(&self.sleepers) {
            thread.unpark();
            // A worker catches its panics; nothing is lost here.
            let _ = worker.join();
        }
    }
}

/// A pointer that threads may share because each writes its own part.
pub(crate) struct SendPtr<T>(pub *mut T);
// SAFETY: the users of `SendPtr` write disjoint parts of a slice that outlives the operation.
unsafe impl<T: Send> Sync for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SendPtr<T> {}
impl<T> SendPtr<T> {
    pub fn get(&self) -> *mut T {
        self.0
    }
}

unsafe fn nothing(_: *const (), _: usize) {}

unsafe fn call<F: Fn(usize) + Sync>(context: *const (), unit: usize) {
    // SAFETY: `context` is the `F` that `run` borrows until all workers are done.
    unsafe { (*context.cast::<F>())(unit) }
}

/// Run units until none is left, those of thread `me` first.
fn take_units(shared: &Shared, me: usize) {
    // SAFETY: called between the start of a run and its end; see `Shared`.
    let job = unsafe { *shared.job.get() };
    let threads = shared.next.len();
    for part in (me..threads).chain(0..me) {
        let end = shared.part(job.units, part + 1);
        loop {
            let unit = shared.next[part].0.fetch_add(1, Relaxed);
            if unit >= end {
                break;
            }
            // SAFETY: the closure is alive: `run` waits for us.
            let done = catch_unwind(AssertUnwindSafe(|| unsafe {
                (job.call)(job.context, unit)
            }));
            if let Err(panic) = done {
                for Next(next) in &shared.next {
                    next.store(job.units, Relaxed);
                }
                *lock(&shared.panic) = Some(panic);
                return;
            }
        }
    }
}

/// One turn of waiting.
fn pause(shared: &Shared) {
    match shared.crowded.load(Relaxed) {
        0 => std::hint::spin_loop(),
        _ => thread::yield_now(),
    }
}

/// Wait until no worker is inside a closed operation.
fn wait_for_workers(shared: &Shared) {
    let inside = || shared.state.load(Acquire) & INSIDE != 0;
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        for _ in 0..256 {
            if !inside() {
                return;
            }
            pause(shared);
        }
    }
    shared
        .crowded
        .store(shared.crowded.load(Relaxed).max(CROWDED), Relaxed);
    *lock(&shared.caller) = Some(thread::current());
    while inside() {
        thread::park();
    }
    *lock(&shared.caller) = None;
}

fn work(shared: &Shared, me: usize) {
    let mut seen = 0;
    while let Some(number) = enter(shared, me, seen) {
        seen = number;
        take_units(shared, me + 1);
        let left = shared.state.fetch_sub(1, SeqCst) - 1;
        // The last one out of a closed operation.
        if left & (OPEN | INSIDE) == 0
            && let Some(caller) = &*lock(&shared.caller)
        {
            caller.unpark();
        }
    }
}

/// Wait for an operation other than `seen` that is open, and enter it; its number. None: stop.
fn enter(shared: &Shared, me: usize, seen: u64) -> Option<u64> {
    let enter = |state: u64| {
        let open = state >> 32 != seen && state & OPEN != 0;
        open && shared
            .state
            .compare_exchange(state, state + 1, SeqCst, Relaxed)
            .is_ok()
    };
    let start = Instant::now();
    loop {
        for _ in 0..256 {
            let state = shared.state.load(Acquire);
            if enter(state) {
                return Some(state >> 32);
            }
            if shared.stop.load(Relaxed) {
                return None;
            }
            pause(shared);
        }
        if start.elapsed() < SPIN {
            continue;
        }
        shared.asleep[me].store(true, SeqCst);
        // Looked at after the flag is up: either we see the operation, or the caller sees the flag and unparks.
        let entered = loop {
            let state = shared.state.load(SeqCst);
            if enter(state) {
                break Some(state >> 32);
            }
            if shared.stop.load(SeqCst) {
                break None;
            }
            if state & OPEN == 0 || state >> 32 == seen {
                thread::park();
            }
        };
        shared.asleep[me].store(false, SeqCst);
        return entered;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for units in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                pool.run(units, |i| {
                    counts[i].fetch_add(1, Relaxed);
                });
                assert!(
                    counts.iter().all(|c| c.load(Relaxed) == 1),
                    "{threads} threads, {units} units"
                );
            }
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = Pool::new(3);
        for _ in 0..3 {
            thread::sleep(SPIN * 4);
            let sum = AtomicUsize::new(0);
            pool.run(100, |i| {
                sum.fetch_add(i, Relaxed);
            });
            assert_eq!(sum.load(Relaxed), 4950);
        }
    }

    #[test]
    fn nobody_waits_for_a_worker_that_has_not_begun() {
        // Many more threads than CPUs: most come too late for most operations.
        let pool = Pool::new(40);
        let sum = AtomicUsize::new(0);
        for _ in 0..2000 {
            pool.run(3, |i| {
                sum.fetch_add(i, Relaxed);
            });
        }
        assert_eq!(sum.load(Relaxed), 6000);
    }

    #[test]
    fn a_slow_worker_is_waited_for_asleep() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            let done = AtomicUsize::new(0);
            let caller = thread::current().id();
            pool.run(2, |_| {
                if thread::current().id() != caller {
                    thread::sleep(PATIENCE * 40);
                }
                done.fetch_add(1, Relaxed);
            });
            assert_eq!(done.load(Relaxed), 2);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(10, |i| assert!(i != 3, "unit three"));
        }));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, |i| {
            sum.fetch_add(i, Relaxed);
        });
        assert_eq!(sum.load(Relaxed), 45);
    }

    #[test]
    fn rows_are_disjoint_and_complete() {
        let pool = Pool::new(2);
        let mut out = vec![0; 7 * 13];
        pool.rows(&mut out, 13, |i, row| row.fill(i + 1));
        assert!(
            out.chunks(13)
                .enumerate()
                .all(|(i, row)| row.iter().all(|&x| x == i + 1))
        );
    }
}
