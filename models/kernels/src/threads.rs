//! One pool of threads for all kernels.
//!
//! A decode step has some two hundred parallel regions per token, so that a region must start and end within a few
//! microseconds: workers spin shortly for the next region before they park, and a worker that comes too late for a
//! region is not waited for.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::JoinHandle;

/// Pauses a worker spins for before it parks: some tens of microseconds.
const SPINS: u32 = 1000;

/// Multiplications below which a second thread does not pay: some microseconds.
pub(crate) const INLINE_PRODUCTS: usize = 1 << 16;

/// Sets the number of threads that work on a kernel, the caller's included. 0 means the machine's parallelism, which is
/// also the default. Waits for a kernel that runs in the pool.
pub fn set(count: usize) {
    let count = if count == 0 { available_parallelism() } else { count };
    let mut pool = lock(pool());
    // The old workers end before the new ones start.
    *pool = None;
    COUNT.store(count, Ordering::Relaxed);
    *pool = Some(Pool::new(count - 1));
}

/// The number of threads that work on a kernel, the caller's included.
pub fn count() -> usize {
    match COUNT.load(Ordering::Relaxed) {
        0 => available_parallelism(),
        count => count,
    }
}

/// Calls `body` once for each index below `tasks`, in parallel. Returns when all have returned; a panic of `body` is
/// passed on then. Where another region is running (another model's thread, or a region within a region) the caller
/// does all the work itself.
pub(crate) fn parallel_for(tasks: usize, body: impl Fn(usize) + Sync) {
    if tasks > 1 && count() > 1 && !ALONE.get() {
        let guard = match pool().try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if let Some(mut guard) = guard {
            return guard.get_or_insert_with(|| Pool::new(count() - 1)).run(tasks, &body);
        }
    }
    (0..tasks).for_each(body);
}

thread_local! {
    /// Whether this thread does all its kernels' work itself.
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Calls `body`, whose kernels run on this thread alone.
pub(crate) fn alone<R>(body: impl FnOnce() -> R) -> R {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            ALONE.set(self.0);
        }
    }
    let _before = Before(ALONE.replace(true));
    body()
}

/// [`parallel_for`] where the work is worth a second thread: `products` is about the number of multiplications in all.
pub(crate) fn parallel_for_worth(products: usize, tasks: usize, body: impl Fn(usize) + Sync) {
    if products <= INLINE_PRODUCTS {
        (0..tasks).for_each(body)
    } else {
        parallel_for(tasks, body)
    }
}

/// Splits `0..length` into ranges of at least `minimum` and calls `body` for each, in parallel. The ranges' bounds are
/// multiples of `minimum` (but for the last one); how many there are depends on the number of threads.
pub(crate) fn parallel_ranges(length: usize, minimum: usize, body: impl Fn(Range<usize>) + Sync) {
    let step = range_step(length, minimum);
    parallel_for(length.div_ceil(step), |task| {
        body(task * step..length.min((task + 1) * step))
    });
}

/// Length of the ranges that `length` is split into: a multiple of `minimum`, about four ranges a thread.
pub(crate) fn range_step(length: usize, minimum: usize) -> usize {
    let minimum = minimum.max(1);
    let tasks = if count() == 1 { 1 } else { 4 * count() };
    length.div_ceil(tasks).div_ceil(minimum).max(1) * minimum
}

static COUNT: AtomicUsize = AtomicUsize::new(0);

fn available_parallelism() -> usize {
    static PARALLELISM: OnceLock<usize> = OnceLock::new();
    *PARALLELISM.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// The pool, started by its first region.
fn pool() -> &'static Mutex<Option<Pool>> {
    static POOL: Mutex<Option<Pool>> = Mutex::new(None);
    &POOL
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Body<'a> = dyn Fn(usize) + Sync + 'a;

/// What the current region calls. The lifetime is erased: see `Pool::run`.
#[derive(Clone, Copy)]
struct Job {
    body: *const Body<'static>,
    tasks: usize,
}

/// `Shared::gate`: the count of workers inside the region, one bit that lets workers enter, and above it the number of
/// the region.
const OPEN: u64 = 1 << 16;
const INSIDE: u64 = OPEN - 1;
const REGION: u64 = OPEN << 1;

struct Shared {
    gate: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    next_task: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    asleep: Box<[AtomicBool]>,
}

// SAFETY: `job` is written only by the holder of the pool's lock while the gate is closed and nobody is inside, and
// read only by workers inside; the gate's atomic operations order the two.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is only used inside a region, while what it points to is alive.
unsafe impl Send for Shared {}

struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of so many workers; fewer where the system refuses to start them.
    fn new(workers: usize) -> Self {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next_task: AtomicUsize::new(0),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            asleep: (0..workers.min(INSIDE as usize))
                .map(|_| AtomicBool::new(false))
                .collect(),
        });
        let start = |index| {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("kernel-{index}"));
            builder.spawn(move || shared.work(index)).ok()
        };
        let workers = (0..shared.asleep.len()).map_while(start).collect();
        Self { shared, workers }
    }

    fn run(&mut self, tasks: usize, body: &Body<'_>) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers use the pointer only between entering and leaving the region, and
        // `Region::drop` returns, also on unwinding, after the last has left and no more can enter.
        let body_pointer = unsafe { std::mem::transmute::<*const Body<'_>, *const Body<'static>>(body) };
        // SAFETY: `&mut self` and the closed, empty gate make this the only access.
        unsafe {
            *shared.job.get() = Some(Job {
                body: body_pointer,
                tasks,
            })
        };
        shared.next_task.store(0, Ordering::Relaxed);
        let number = (shared.gate.load(Ordering::Relaxed) / REGION + 1) * REGION;
        shared.gate.store(number | OPEN, Ordering::SeqCst);
        let region = Region { shared };
        for (asleep, worker) in shared.asleep.iter().zip(&self.workers).take(tasks - 1) {
            if asleep.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.run_tasks(body, tasks);
        drop(region);
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of bodies, so that joining cannot fail.
            let _ = worker.join();
        }
    }
}

/// An open region; dropping it closes the gate and waits for the workers inside.
struct Region<'a> {
    shared: &'a Shared,
}

impl Drop for Region<'_> {
    fn drop(&mut self) {
        // Where the caller unwinds, the tasks that nobody began are left out.
        self.shared.next_task.fetch_add(usize::MAX / 2, Ordering::Relaxed);
        self.shared.gate.fetch_and(!OPEN, Ordering::SeqCst);
        let mut spins = 0;
        while self.shared.gate.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            // Beyond a few microseconds a worker inside has probably lost its core: let it have this one.
            if spins % 256 == 0 {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
    }
}

impl Shared {
    fn run_tasks(&self, body: &Body<'_>, tasks: usize) {
        loop {
            let task = self.next_task.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            body(task);
        }
    }

    /// A worker's life.
    fn work(&self, index: usize) {
        let mut seen = 0;
        let mut spins = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let gate = self.gate.load(Ordering::SeqCst);
            if gate & OPEN != 0 && gate / REGION != seen {
                let entered = self
                    .gate
                    .compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed);
                if entered.is_ok() {
                    seen = gate / REGION;
                    spins = 0;
                    self.work_inside();
                }
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                self.asleep[index].store(true, Ordering::SeqCst);
                // Looked at again after the announcement: a region opened in between wakes nobody who is not announced.
                let gate = self.gate.load(Ordering::SeqCst);
                let open = gate & OPEN != 0 && gate / REGION != seen;
                if !open && !self.stop.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                self.asleep[index].store(false, Ordering::SeqCst);
                spins = 0;
            }
        }
    }

    /// Does tasks of the region this worker has entered, then leaves it.
    fn work_inside(&self) {
        let done = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: written before the gate opened, and not written again while this worker is inside.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: the region's caller keeps the body alive until this worker has left.
                self.run_tasks(unsafe { &*job.body }, job.tasks);
            }
        }));
        if let Err(panic) = done {
            lock(&self.panic).get_or_insert(panic);
        }
        self.gate.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Tests that change the number of threads take turns.
#[cfg(test)]
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    lock(&TURN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let _turn = turn();
        for threads in [1, 2, 5] {
            set(threads);
            for tasks in [0, 1, 2, 7, 100] {
                let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    parallel_for(tasks, |task| {
                        runs[task].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 50));
            }
        }
        set(0);
    }

    #[test]
    fn concurrent_and_nested_regions_are_correct() {
        let _turn = turn();
        set(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        parallel_for(8, |_| {
                            parallel_for(2, |_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 4 * 200 * 16);
        set(0);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let _turn = turn();
        set(2);
        for _ in 0..20 {
            let result = catch_unwind(|| parallel_for(16, |task| assert_ne!(task, 9, "task nine")));
            assert!(result.is_err());
        }
        let total = AtomicUsize::new(0);
        parallel_for(10, |task| {
            total.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(total.load(Ordering::Relaxed), 45);
        set(0);
    }

    #[test]
    fn sleeping_workers_are_woken() {
        let _turn = turn();
        set(2);
        for _ in 0..20 {
            // Each task waits for the other one, so that the region ends only where two threads take part.
            let barrier = std::sync::Barrier::new(2);
            parallel_for(2, |_| {
                barrier.wait();
            });
            let asleep = |pool: &Option<Pool>| pool.as_ref().unwrap().shared.asleep[0].load(Ordering::SeqCst);
            while !asleep(&lock(pool())) {
                std::thread::yield_now();
            }
        }
        set(0);
    }

    #[test]
    fn ranges_cover_the_length() {
        let covered: Vec<_> = (0..1001).map(|_| AtomicUsize::new(0)).collect();
        parallel_ranges(1001, 16, |range| {
            assert!(range.start % 16 == 0);
            range.for_each(|i| {
                covered[i].fetch_add(1, Ordering::Relaxed);
            });
        });
        assert!(covered.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }
}
