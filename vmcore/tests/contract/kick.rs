//! Kicks: from other threads, from callbacks, before a run, in the middle of string I/O.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use vmcore::backend::{Backend, VcpuExit};

use crate::guest::{Guest, Mode, OnOut, Recorder, assemble};

crate::contract!(
    a_kick_stops_a_guest_that_spins,
    a_kick_before_the_run_is_not_lost,
    a_kick_from_a_callback_ends_the_run_after_the_access,
    a_kick_in_string_output_loses_nothing,
    a_handle_outlives_its_vcpu,
    kicks_leave_the_threads_signals_alone,
);

fn spinning(backend: &dyn Backend) -> Guest {
    let code = assemble(Mode::Protected, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(eax).unwrap();
        a.jmp(again).unwrap();
    });
    Guest::new(backend, Mode::Protected, &code)
}

fn a_kick_stops_a_guest_that_spins(backend: &dyn Backend) {
    const ROUNDS: usize = 1000;
    let mut guest = spinning(backend);
    let handle = guest.vcpu.handle();
    let (begun, begins) = mpsc::channel();
    let (ended, ends) = mpsc::channel();
    let kicker = thread::spawn(move || {
        let mut latencies = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            begins.recv().unwrap();
            thread::sleep(Duration::from_micros(50));
            let kicked = Instant::now();
            handle.kick();
            let end: Instant = ends.recv().unwrap();
            latencies.push(end.saturating_duration_since(kicked));
        }
        latencies
    });
    for _ in 0..ROUNDS {
        begun.send(()).unwrap();
        assert_eq!(guest.run(&mut Recorder::default()), VcpuExit::Kicked);
        ended.send(Instant::now()).unwrap();
    }
    let mut latencies = kicker.join().unwrap();
    latencies.sort();
    let (median, worst) = (latencies[ROUNDS / 2], latencies[ROUNDS - 1]);
    println!("kick latency: median {median:?}, worst {worst:?}");
    // The guest never exits by itself. How fast it is, a busy machine does not tell.
    assert!(median < Duration::from_millis(100), "median {median:?}");
}

fn a_kick_before_the_run_is_not_lost(backend: &dyn Backend) {
    let code = assemble(Mode::Protected, |a| a.hlt().unwrap());
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let handle = guest.vcpu.handle();
    handle.kick();
    handle.clone().kick();
    let before = guest.vcpu.regs().unwrap();
    assert_eq!(guest.run(&mut Recorder::default()), VcpuExit::Kicked);
    assert_eq!(guest.vcpu.regs().unwrap(), before);
    assert_eq!(guest.run(&mut Recorder::default()), VcpuExit::Halted);
}

fn a_kick_from_a_callback_ends_the_run_after_the_access(backend: &dyn Backend) {
    let code = assemble(Mode::Protected, |a| {
        a.out(0x80, al).unwrap();
        a.out(0x81, al).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let handle = guest.vcpu.handle();
    let mut ports = vec![];
    let mut io = OnOut(|port, _: &[u8]| {
        ports.push(port);
        if port == 0x80 {
            handle.kick();
        }
    });
    assert_eq!(guest.run(&mut io), VcpuExit::Kicked);
    // The instruction is finished: RIP is behind it.
    assert_eq!(guest.vcpu.regs().unwrap().rip, crate::guest::CODE + 2);
    assert_eq!(guest.run(&mut io), VcpuExit::Halted);
    assert_eq!(ports, [0x80, 0x81]);
}

/// The guest writes 3,000 words by one REP OUTSW; it is kicked again and again on the way. Every
/// word arrives once, in order.
fn a_kick_in_string_output_loses_nothing(backend: &dyn Backend) {
    const WORDS: u16 = 3000;
    let code = assemble(Mode::Protected, |a| {
        a.mov(esi, 0x10_0000).unwrap();
        a.mov(ecx, u32::from(WORDS)).unwrap();
        a.mov(edx, 0x80).unwrap();
        a.rep().outsw().unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let words: Vec<u8> = (0..WORDS).flat_map(u16::to_le_bytes).collect();
    guest.store(0x10_0000, &words);
    let handle = guest.vcpu.handle();
    let mut seen = vec![];
    let mut kicked = 0;
    loop {
        let exit = guest.run(&mut OnOut(|_, data: &[u8]| {
            assert_eq!(data.len(), 2);
            seen.extend_from_slice(data);
            if seen.len() % 1000 == 0 {
                handle.kick();
            }
        }));
        match exit {
            VcpuExit::Kicked => kicked += 1,
            other => break assert_eq!(other, VcpuExit::Halted),
        }
    }
    assert!(kicked >= 1);
    assert!(seen == words, "{} bytes of {}", seen.len(), words.len());
}

fn a_handle_outlives_its_vcpu(backend: &dyn Backend) {
    let guest = spinning(backend);
    let handle = guest.vcpu.handle();
    drop(guest);
    handle.kick();
}

/// No signal is left pending and the mask is what it was, however kicks and returns fall together.
fn kicks_leave_the_threads_signals_alone(backend: &dyn Backend) {
    let signals = || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let lines = status.lines().filter(|l| ["SigPnd:", "SigBlk:"].iter().any(|name| l.starts_with(name)));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let before = signals();
    let code = assemble(Mode::Protected, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.hlt().unwrap();
        a.jmp(again).unwrap();
    });
    let mut guest = Guest::new(backend, Mode::Protected, &code);
    let handle = guest.vcpu.handle();
    let done = std::sync::atomic::AtomicBool::new(false);
    let (mut halts, mut kicks) = (0, 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                handle.kick();
            }
        });
        let begin = Instant::now();
        // On a busy machine the other thread may come late.
        while begin.elapsed() < Duration::from_millis(300) || kicks <= 10 {
            assert!(begin.elapsed() < Duration::from_secs(60), "{kicks} kicks");
            match guest.run(&mut Recorder::default()) {
                VcpuExit::Kicked => kicks += 1,
                other => {
                    assert_eq!(other, VcpuExit::Halted);
                    halts += 1;
                }
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    println!("{kicks} kicks and {halts} halts");
    assert_eq!(signals(), before);
}
