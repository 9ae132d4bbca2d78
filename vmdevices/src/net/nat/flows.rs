//! The table of flows.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Instant;

use super::datagram::Datagrams;
use super::env::{Env, Key, gauge};
use super::tcp::Tcp;
use super::timers::Timers;

#[derive(Debug)]
pub(super) enum Kind {
    Tcp(Box<Tcp>),
    Datagrams(Datagrams),
}

#[derive(Debug)]
pub(super) struct Flow {
    pub(super) key: Key,
    pub(super) kind: Kind,
    /// It waits in [`Flows::ready`].
    queued: bool,
    /// The time that the timers have for it: its deadline, or earlier.
    timer: Option<Instant>,
}

impl Flow {
    fn last(&self) -> Instant {
        match &self.kind {
            Kind::Tcp(tcp) => tcp.last(),
            Kind::Datagrams(datagrams) => datagrams.last(),
        }
    }

    fn deadline(&self, env: &Env) -> Instant {
        match &self.kind {
            Kind::Tcp(tcp) => tcp.deadline(env),
            Kind::Datagrams(datagrams) => datagrams.deadline(env, &self.key),
        }
    }

    fn has_output(&self) -> bool {
        match &self.kind {
            Kind::Tcp(tcp) => tcp.has_output(),
            Kind::Datagrams(datagrams) => datagrams.readable,
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    /// How often it was used: an event of a flow that is gone finds another number.
    generation: u32,
    flow: Option<Flow>,
}

/// Flows by number and by what they are between. A token is generation and number of a slot, with the
/// highest bit clear.
#[derive(Debug, Default)]
pub(super) struct Flows {
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
    /// By a forward's address and that of who came in.
    forwarded: HashMap<(SocketAddr, SocketAddr), Key>,
    /// Tokens of what may have something for the guest, in turn.
    pub(super) ready: VecDeque<u64>,
}

impl Flows {
    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn find(&self, key: &Key) -> Option<usize> {
        self.by_key.get(key).copied()
    }

    /// The key of the datagrams that `peer` sends to the forward at `bind`.
    pub(super) fn find_forwarded(&self, bind: SocketAddr, peer: SocketAddr) -> Option<Key> {
        self.forwarded.get(&(bind, peer)).copied()
    }

    pub(super) fn get(&mut self, number: usize) -> Option<&mut Flow> {
        self.slots.get_mut(number)?.flow.as_mut()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.slots.iter().filter_map(|slot| slot.flow.as_ref())
    }

    /// The number of the flow with the token `token`, if it is still there.
    pub(super) fn resolve(&self, token: u64) -> Option<usize> {
        // The lower half.
        let number = (token & 0xffff_ffff) as usize;
        let slot = self.slots.get(number)?;
        (u64::from(slot.generation) == token >> 32 && slot.flow.is_some()).then_some(number)
    }

    fn token(&self, number: usize) -> u64 {
        self.slots.get(number).map_or(0, |slot| u64::from(slot.generation) << 32) | number as u64
    }

    /// Token that the next flow will have.
    pub(super) fn reserve(&mut self) -> u64 {
        let number = self.free.last().copied().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.free.push(self.slots.len() - 1);
            self.slots.len() - 1
        });
        self.token(number)
    }

    /// Puts the flow in for which [`Flows::reserve`] was asked just before. The key must be new.
    pub(super) fn insert(&mut self, env: &mut Env, key: Key, kind: Kind) -> Option<usize> {
        let number = self.free.pop()?;
        if let Kind::Datagrams(datagrams) = &kind
            && let Some(ends) = datagrams.forward()
        {
            self.forwarded.insert(ends, key);
        }
        self.slots.get_mut(number)?.flow = Some(Flow { key, kind, queued: false, timer: None });
        self.by_key.insert(key, number);
        self.counted(env);
        Some(number)
    }

    pub(super) fn remove(&mut self, env: &mut Env, timers: &mut Timers<u64>, number: usize) -> Option<Flow> {
        let token = self.token(number);
        let slot = self.slots.get_mut(number)?;
        let flow = slot.flow.take()?;
        timers.remove(flow.timer, token);
        slot.generation = slot.generation.wrapping_add(1) & 0x7fff_ffff;
        self.free.push(number);
        self.by_key.remove(&flow.key);
        if let Kind::Datagrams(datagrams) = &flow.kind
            && let Some(ends) = datagrams.forward()
        {
            self.forwarded.remove(&ends);
        }
        self.counted(env);
        Some(flow)
    }

    fn counted(&self, env: &mut Env) {
        env.flows = self.len();
        gauge(&env.counters().flows, self.len());
    }

    /// The flow in which nothing has happened for the longest time.
    pub(super) fn oldest(&self) -> Option<usize> {
        let flows = self.slots.iter().enumerate();
        let flows = flows.filter_map(|(number, slot)| Some((slot.flow.as_ref()?.last(), number)));
        flows.min().map(|(_, number)| number)
    }

    /// Sees to it that a flow gets its turn and its time, after something happened to it.
    pub(super) fn touched(&mut self, env: &Env, timers: &mut Timers<u64>, number: usize) {
        let token = self.token(number);
        let Some(flow) = self.slots.get_mut(number).and_then(|slot| slot.flow.as_mut()) else { return };
        if !flow.queued && flow.has_output() {
            flow.queued = true;
            self.ready.push_back(token);
        }
        let deadline = flow.deadline(env);
        if flow.timer.is_none_or(|timer| deadline < timer) {
            timers.set(flow.timer.replace(deadline), deadline, token);
        }
    }

    /// Takes the next flow that may have something for the guest; `Err` for other tokens.
    pub(super) fn next_ready(&mut self) -> Option<Result<usize, u64>> {
        while let Some(token) = self.ready.pop_front() {
            if token & super::handle::FORWARD != 0 {
                return Some(Err(token));
            }
            if let Some(number) = self.resolve(token) {
                if let Some(flow) = self.get(number) {
                    flow.queued = false;
                }
                return Some(Ok(number));
            }
        }
        None
    }

    /// A timer for the flow came up: whether its time has come.
    pub(super) fn is_due(&mut self, env: &Env, number: usize) -> bool {
        let Some(flow) = self.get(number) else { return false };
        flow.timer = None;
        flow.deadline(env) <= env.now
    }
}
