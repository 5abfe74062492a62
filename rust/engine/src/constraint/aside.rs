//! One thread beside the engine's, for what need not wait for the model. Knows nothing of grammars.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;

type Work = Box<dyn FnOnce() + Send>;

/// Runs work in order, on a thread that starts with the first; dropped, the thread ends after what it has.
///
/// Belongs to the engine's thread, and so never crosses a fork.
#[derive(Default)]
pub struct Aside {
    thread: Option<mpsc::Sender<Work>>,
}

impl Aside {
    /// Run it there, or here where no thread can be had. A panic in it is swallowed: who waits for an answer finds
    /// that nobody will send one.
    pub fn run(&mut self, work: Work) {
        if self.thread.is_none() {
            self.thread = start();
        }
        let Some(thread) = &self.thread else {
            return work();
        };
        if let Err(mpsc::SendError(work)) = thread.send(work) {
            work();
        }
    }
}

fn start() -> Option<mpsc::Sender<Work>> {
    let (sender, inbox) = mpsc::channel::<Work>();
    std::thread::Builder::new()
        .name("hfcore-aside".into())
        .spawn(move || {
            for work in inbox {
                let _ = catch_unwind(AssertUnwindSafe(work));
            }
        })
        .ok()?;
    Some(sender)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_in_order_and_a_panic_ends_nothing() {
        let mut aside = Aside::default();
        let (sender, got) = mpsc::channel();
        for n in 0..5 {
            let sender = sender.clone();
            aside.run(Box::new(move || {
                assert_ne!(n, 2, "the third");
                let _ = sender.send(n);
            }));
        }
        drop(sender);
        assert_eq!(got.iter().collect::<Vec<_>>(), [0, 1, 3, 4]);
    }
}
