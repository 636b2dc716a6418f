//! Measuring the kernels on request.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_kernels_cpu::benchmark::{self, Measurement};
use tokio::sync::{Notify, mpsc};
use tonic::Status;

use crate::access::Caller;
use crate::app::App;
use crate::error::{Error, Result};
use crate::requests::{Phase, RequestGuard};

/// What the client receives.
type Message = Result<v1::RunKernelBenchmarksResponse, Status>;

/// Starts to measure the named kernels (all where there are none), once no other run is under way. The run ends when the
/// receiver is dropped or the request is cancelled.
pub(super) fn start(app: &Arc<App>, caller: &Caller, kernels: Vec<String>) -> Result<mpsc::Receiver<Message>> {
    let known = benchmark::kernels();
    if let Some(unknown) = kernels.iter().find(|name| !known.contains(&name.as_str())) {
        let name: String = unknown.chars().take(40).collect();
        let message = format!("there is no kernel {name:?}; the kernels are {}", known.join(", "));
        return Err(Error::InvalidArgument(message));
    }
    // Room for all figures and an error, so that a client that reads slowly holds up nobody.
    let (sender, receiver) = mpsc::channel(benchmark::count(&|kernel| is_wanted(&kernels, kernel)) + 1);
    let guard = app.requests.begin(caller, "benchmark", "")?;
    let cancelled = Arc::new(Notify::new());
    guard.wake_on_cancel(Arc::clone(&cancelled));
    let turn = Arc::clone(&app.benchmarking);
    tokio::spawn(async move {
        let turn = tokio::select! {
            turn = turn.lock_owned() => turn,
            () = sender.closed() => return,
            () = cancelled.notified() => {
                let _ = sender.send(Err(Error::Cancelled.into())).await;
                return;
            }
        };
        // On a thread that may block; a run that is cancelled ends by itself.
        tokio::task::spawn_blocking(move || {
            run(&kernels, &guard, &sender);
            drop(turn);
        });
    });
    Ok(receiver)
}

fn is_wanted(kernels: &[String], kernel: &str) -> bool {
    kernels.is_empty() || kernels.iter().any(|name| name == kernel)
}

fn run(kernels: &[String], guard: &RequestGuard, sender: &mpsc::Sender<Message>) {
    let wanted = |kernel: &str| is_wanted(kernels, kernel);
    let total = benchmark::count(&wanted) as u64;
    guard.set_phase(Phase::Running);
    guard.set_progress(0, total);
    let mut done = 0;
    benchmark::measure(&wanted, &mut |measurement| {
        if guard.is_cancelled() {
            // A client that is gone needs no answer.
            let _ = sender.blocking_send(Err(Error::Cancelled.into()));
            return false;
        }
        done += 1;
        guard.set_progress(done, total);
        sender.blocking_send(Ok(message(&measurement))).is_ok()
    });
}

fn message(measurement: &Measurement) -> v1::RunKernelBenchmarksResponse {
    let measurement = v1::KernelMeasurement {
        kernel: measurement.kernel.to_owned(),
        shape: measurement.shape.iter().map(|size| *size as u64).collect(),
        dtype: measurement.dtype.to_owned(),
        variant: measurement.variant.to_owned(),
        value: measurement.value,
        unit: measurement.unit.name().to_owned(),
        ratio_to_portable: measurement.ratio_to_portable,
    };
    v1::RunKernelBenchmarksResponse {
        measurement: Some(measurement),
    }
}
