//! The memory management unit: translation of linear addresses, with its caches, and every access
//! to guest memory.
//!
//! Translations are cached in *banks*: one for each kind of access rights (supervisor, supervisor
//! that may touch user pages under SMAP, user) and process context (PCID). A bank has a table for
//! reads, one for writes and one for execution, so that a hit needs no test of rights, and a change
//! of privilege or of address space selects another bank instead of dropping this one.

mod access;
mod bulk;
mod tlb;
mod walk;
mod wide;

use std::sync::Arc;

use self::tlb::{Bank, Banks};
use super::cpu::{Mode, cr0, cr4, efer};
use super::memory::PhysMap;

pub(in crate::soft) use self::walk::{Access, PHYSICAL_BITS};

/// The state of one vCPU's MMU.
pub(in crate::soft) struct Mmu {
    pub(in crate::soft) phys: Arc<PhysMap>,
    banks: Banks,
    /// Control registers as of [`Mmu::configure`].
    paging: Paging,
    /// What blocks' addresses are valid for: changes with the bank, and whenever a translation of it
    /// was dropped.
    context: u64,
    /// Linear addresses of pages whose data are watched: no access to them is a fast hit.
    watched: Vec<u64>,
}

/// What the walk depends on.
#[derive(Clone, Copy, Debug, Default)]
struct Paging {
    cr3: u64,
    /// CR0.PG.
    on: bool,
    /// CR0.WP.
    write_protect: bool,
    /// CR0.AM.
    alignment: bool,
    /// CR4.PSE.
    pse: bool,
    /// CR4.PAE.
    pae: bool,
    /// CR4.PCIDE.
    pcide: bool,
    smep: bool,
    smap: bool,
    /// EFER.LMA: four levels.
    long: bool,
    /// EFER.NXE.
    nx: bool,
    /// The PAE page-directory-pointer table, as read when CR3 was loaded (SDM vol. 3A, 4.4.1).
    pdpte: [u64; 4],
}

impl Mmu {
    pub(in crate::soft) fn new(phys: Arc<PhysMap>) -> Self {
        let banks = Banks::new();
        Self { phys, banks, paging: Paging::default(), context: 0, watched: Vec::new() }
    }

    /// Takes over control registers, and drops every translation.
    pub(in crate::soft) fn configure(&mut self, c0: u64, c3: u64, c4: u64, efer_value: u64) {
        self.paging = Paging {
            cr3: c3,
            on: c0 & cr0::PG != 0,
            write_protect: c0 & cr0::WP != 0,
            alignment: c0 & cr0::AM != 0,
            pse: c4 & cr4::PSE != 0,
            pae: c4 & cr4::PAE != 0,
            pcide: c4 & cr4::PCIDE != 0,
            smep: c4 & cr4::SMEP != 0,
            smap: c4 & cr4::SMAP != 0,
            long: efer_value & efer::LMA != 0,
            nx: efer_value & efer::NXE != 0,
            pdpte: self.paging.pdpte,
        };
        self.load_pdptes();
        self.banks.flush_all();
        self.banks.set_process(self.process());
    }

    /// The process context, 0 without CR4.PCIDE.
    fn process(&self) -> u16 {
        if self.paging.pcide { (self.paging.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// Takes over CR3. Unless `keep`, translations of the new process context are dropped, except
    /// global ones. The caller then calls `Cpu::select_bank`.
    pub(in crate::soft) fn set_cr3(&mut self, cr3: u64, keep: bool) {
        self.paging.cr3 = cr3;
        self.load_pdptes();
        let process = self.process();
        self.banks.set_process(process);
        if !keep {
            self.banks.flush_process(process);
        }
    }

    /// Drops every translation, global ones included.
    pub(in crate::soft) fn flush_all(&mut self) {
        self.banks.flush_all();
        self.refresh_context();
    }

    /// Drops the translations of one process context, except global ones.
    pub(in crate::soft) fn flush_process(&mut self, process: u16) {
        self.banks.flush_process(process);
        self.refresh_context();
    }

    /// Drops the translations of the page of linear address `at`, in every context.
    pub(in crate::soft) fn flush_page(&mut self, at: u64) {
        self.banks.flush_page(at);
        self.refresh_context();
    }

    /// Drops translations for writing.
    pub(in crate::soft) fn flush_writes(&mut self) {
        self.banks.flush_writes();
    }

    /// Drops translations for writing to the guest-physical page `gpa`.
    pub(in crate::soft) fn flush_writes_to(&mut self, gpa: u64) {
        self.banks.flush_writes_to(gpa);
    }

    /// Uses another map of guest memory.
    pub(in crate::soft) fn set_phys(&mut self, phys: Arc<PhysMap>) {
        self.banks.flush_all();
        self.refresh_context();
        self.phys = phys;
    }

    /// Selects the bank for `mode` and RFLAGS.AC.
    #[inline]
    pub(in crate::soft) fn select(&mut self, mode: Mode, ac: bool) {
        let kind = match mode.cpl {
            3 if self.paging.alignment && ac => tlb::USER_ALIGNED,
            3 => tlb::USER,
            _ if self.paging.smap && ac => tlb::SUPERVISOR_AC,
            _ => tlb::SUPERVISOR,
        };
        self.banks.select(kind);
        self.context = self.banks.active().context << 8 | u64::from(mode.key());
    }

    /// Watches the data of `pages`, linear addresses, and no others.
    pub(in crate::soft) fn watch(&mut self, pages: Vec<u64>) {
        if std::mem::replace(&mut self.watched, pages) != self.watched {
            self.flush_all();
        }
    }

    /// Whether every access to data at `at` must go the slow way.
    fn slow_data(&self, at: u64) -> bool {
        self.banks.kind() == tlb::USER_ALIGNED || self.watched.contains(&(at & tlb::PAGE))
    }

    /// Whether accesses must be aligned: CR0.AM and RFLAGS.AC at privilege level 3.
    fn checks_alignment(&self) -> bool {
        self.banks.kind() == tlb::USER_ALIGNED
    }

    fn refresh_context(&mut self) {
        self.context = self.banks.active().context << 8 | self.context & 0xff;
    }

    /// A number that is equal only while the same mode, privilege and translations apply.
    #[inline(always)]
    pub(in crate::soft) fn context(&self) -> u64 {
        self.context
    }

    /// The bank in use.
    #[inline(always)]
    fn bank(&self) -> &Bank {
        self.banks.active()
    }
}
