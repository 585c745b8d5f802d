"""Students judged beside their teachers and real video."""
