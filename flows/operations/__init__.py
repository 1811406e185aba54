"""Operations on versions that people start: promotion, rollback, retention, reproduction."""
